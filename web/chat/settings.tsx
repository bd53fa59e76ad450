import type { JSX } from "preact";
import { language, useWords } from "../shared/i18n";
import { useStore } from "../shared/store";
import { Check, Field } from "../shared/widgets";
import { explain } from "./connection";
import { normalBase } from "./server";
import {
  bases, chooseServer, chosenModels, comparing, connections, isPlain, keys, LETTERS, ownTools, parameters, serverOf,
  serverTools, type Parameters, type Side,
} from "./state";
import { TOOLS, WORDS } from "./words";

export function SettingsPanel(props: { hidden: boolean }): JSX.Element {
  const t = useWords(WORDS);
  const both = useStore(comparing);
  const value = useStore(parameters);
  const change = (changes: Partial<Parameters>) => parameters.set({ ...parameters.value, ...changes });
  for (const connection of connections) useStore(connection);
  const plain = ([0, 1] as const).slice(0, both ? 2 : 1).every(isPlain);
  const number = (name: "temperature" | "topP" | "maxTokens" | "seed", limits: { min: number; max?: number; step: number }) => (
    <Field label={t(name)}>
      <input
        type="number"
        {...limits}
        placeholder={t("byServer")}
        value={value[name]}
        onInput={(event) => change({ [name]: event.currentTarget.value })}
      />
    </Field>
  );
  return (
    <aside id="settings" class="settings" aria-label={t("settings")} hidden={props.hidden}>
      <ServerSettings side={0} title={both ? t("serverOf", { side: "A" }) : t("server")} />
      {both && <ServerSettings side={1} title={t("serverOf", { side: "B" })} />}
      <section>
        <Field label={t("format")}>
          <select
            value={value.format}
            aria-describedby={plain ? "plain-hint" : undefined}
            onChange={(event) => change({ format: event.currentTarget.value as Parameters["format"] })}
          >
            <option value="">{t("byModel")}</option>
            <option value="chat">{t("formatChat")}</option>
            <option value="plain">{t("formatPlain")}</option>
          </select>
        </Field>
        {plain && <small id="plain-hint">{t("plainHint")}</small>}
        <Field label={t("system")}>
          <textarea rows={3} value={value.system} onInput={(event) => change({ system: event.currentTarget.value })} />
        </Field>
      </section>
      <section>
        <h2>{t("sampling")}</h2>
        <div class="pairs">
          {number("temperature", { min: 0, max: 2, step: 0.1 })}
          {number("topP", { min: 0, max: 1, step: 0.05 })}
          {number("maxTokens", { min: 1, step: 1 })}
          {number("seed", { min: 0, step: 1 })}
          <Field label={t("thinking")}>
            <select
              value={value.thinking}
              onChange={(event) => change({ thinking: event.currentTarget.value as Parameters["thinking"] })}
            >
              <option value="">{t("byServer")}</option>
              <option value="on">{t("on")}</option>
              <option value="off">{t("off")}</option>
            </select>
          </Field>
        </div>
      </section>
      <ToolSettings value={value} change={change} />
      <section>
        <Check label={t("tokenView")} checked={value.tokens} onChange={(tokens) => change({ tokens })} />
        <small>{t("tokenViewHint")}</small>
      </section>
    </aside>
  );
}

function ServerSettings({ side, title }: { side: Side; title: string }): JSX.Element {
  const t = useWords(WORDS);
  const base = useStore(bases)[side]!;
  const key = useStore(keys)[base] ?? "";
  const connection = useStore(connections[side]!);
  useStore(chosenModels);
  const replace = (list: string[], value: string) => list.map((old, n) => (n === side ? value : old));
  return (
    <section>
      <h2>{title}</h2>
      <Field label={t("address")}>
        <input
          type="url"
          placeholder={t("thisServer")}
          value={base}
          onChange={(event) => chooseServer(side, normalBase(event.currentTarget.value))}
        />
      </Field>
      <Field label={t("key")} hint={t("keyHint")}>
        <input
          type="password"
          autocomplete="off"
          value={key}
          onChange={(event) => keys.set({ ...keys.value, [base]: event.currentTarget.value.trim() })}
        />
      </Field>
      <Field label={t("model")}>
        <select
          value={serverOf(side).model}
          disabled={connection.models.length < 2}
          onChange={(event) => chosenModels.set(replace(chosenModels.value, event.currentTarget.value))}
        >
          {connection.models.length === 0 && <option value="">{t("noModel")}</option>}
          {connection.models.map(({ id }) => <option key={id}>{id}</option>)}
        </select>
      </Field>
      {connection.state === "failed" && (
        <p class="notice bad" role="status" data-side={LETTERS[side]}>{explain(connection.error, base, t)}</p>
      )}
    </section>
  );
}

function ToolSettings(props: { value: Parameters; change: (changes: Partial<Parameters>) => void }): JSX.Element {
  const t = useWords(WORDS);
  const tools = useStore(serverTools);
  const index = useStore(language) === "zh" ? 1 : 0;
  const { value, change } = props;
  const wrong = ownTools(value.ownTools) === undefined;
  const toggle = (name: string, on: boolean) =>
    change({ tools: on ? [...value.tools, name] : value.tools.filter((other) => other !== name) });
  return (
    <section>
      <fieldset>
        <legend>{t("tools")}</legend>
        {tools.length === 0 && <small>{t("noTools")}</small>}
        {tools.map(({ function: { name, description } }) => (
          <Check
            key={name}
            label={<><span class="mono">{name}</span> <small>{TOOLS[name]?.[index] ?? description}</small></>}
            checked={value.tools.includes(name)}
            onChange={(on) => toggle(name, on)}
          />
        ))}
      </fieldset>
      <details class="fold">
        <summary>{t("ownTools")}</summary>
        <Field label={t("ownTools")} hint={wrong ? t("ownToolsWrong") : t("ownToolsHint")}>
          <textarea
            rows={5}
            class="mono"
            spellcheck={false}
            aria-invalid={wrong}
            placeholder='[{"type": "function", "function": {"name": "…"}}]'
            value={value.ownTools}
            onInput={(event) => change({ ownTools: event.currentTarget.value })}
          />
        </Field>
      </details>
    </section>
  );
}
