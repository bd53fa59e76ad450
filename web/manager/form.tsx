import type { JSX } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { Check, Field } from "../shared/widgets";
import {
  ApiError,
  get,
  post,
  type FileEntry,
  type Form,
  type Info,
  type Job,
  type JobRequest,
  type Option,
  type Plan,
} from "./api";
import { tail } from "./format";
import { description, label, useText, type Key } from "./words";

type Values = Record<string, string | boolean>;
const GROUPS = ["main", "layout", "output"] as const;
const MOST = 24; // options of "more" that are shown at a time
const FACTS = ["device", "layout", "model", "batch", "algorithm", "step", "memory", "time", "data", "save", "begins"];

/** What a new job of a stage begins with. */
const EMPTY: JobRequest = {
  stage: "pretrain", name: "", model: "", recipe: "", data: "", tokenizer: "", weights: "", lora: "", teacher: "",
  reward_model: "", settings: {}, device: "", devices: [],
}; // prettier-ignore

/** The form of a new job: its fields come from the manager, which reads presets, recipes and the programs' flags. */
export function NewJob(props: { info: Info; started: (job: Job) => void }): JSX.Element {
  const t = useText();
  const [request, setRequest] = useState<JobRequest>(EMPTY);
  const [values, setValues] = useState<Values>({});
  const [form, setForm] = useState<Form>();
  const [error, setError] = useState("");
  const [reviewed, setReviewed] = useState<{ request: JobRequest; plan: Plan }>();
  const [checks, setChecks] = useState(false);
  const change = (changes: Partial<JobRequest>) => setRequest((old) => ({ ...old, ...changes }));

  useEffect(() => {
    const query = new URLSearchParams({ recipe: request.recipe });
    query.set("model", request.model || (request.data ? "minimind3" : "minimind3_tiny"));
    let current = true;
    get<Form>(`/api/form/${request.stage}?${query}`).then(
      (found) => current && setForm(found),
      (problem: ApiError) => current && setError(problem.message),
    );
    return () => {
      current = false;
    };
  }, [request.stage, request.model, request.recipe, request.data]);

  const body = (): JobRequest => {
    const names = new Set(form?.options.map((option) => option.name));
    const given = Object.entries(values).filter(([name, value]) => names.has(name) && value !== "" && value !== false);
    return { ...request, settings: Object.fromEntries(given) };
  };
  const review = async (event: Event) => {
    event.preventDefault();
    setError("");
    setChecks(true);
    try {
      const request = body();
      setReviewed({ request, plan: await post<Plan>("/api/plan", request) });
    } catch (problem) {
      setError((problem as ApiError).message);
    }
    setChecks(false);
  };
  const start = async () => {
    const request = reviewed?.request;
    if (!request) return; // a second click
    setReviewed(undefined);
    try {
      props.started(await post<Job>("/api/jobs", request));
    } catch (problem) {
      setError((problem as ApiError).message);
    }
  };
  const choose = (stage: string) => {
    setError("");
    setForm(undefined);
    const inputs = props.info.stages[stage]!.inputs;
    const kept = Object.fromEntries(
      (["data", "tokenizer", "weights", "lora", "teacher", "reward_model"] as const).map((name) => [
        name,
        name in inputs && name !== "data" ? request[name] : "",
      ]),
    );
    change({ stage, ...kept });
  };
  const trains = form?.options.some((option) => option.name === "EPOCHS" || option.name.includes("."));
  return (
    <form class="new-job" onSubmit={review}>
      <h2 tabIndex={-1}>{t("newJob")}</h2>
      <fieldset class="fields" disabled={checks}>
        <div class="card grid">
          <Field label={t("stage")}>
            <select value={request.stage} onChange={(event) => choose(event.currentTarget.value)}>
              {Object.keys(props.info.stages).map((name) => (
                <option key={name}>{name}</option>
              ))}
            </select>
          </Field>
          <Field label={t("name")} hint={t("nameHint")}>
            <input value={request.name} maxLength={80} onInput={(event) => change({ name: event.currentTarget.value })} />
          </Field>
          {trains && (
            <Field label={t("model")}>
              <select value={request.model} onChange={(event) => change({ model: event.currentTarget.value })}>
                <option value="">
                  {t("default")} ({request.data ? "minimind3" : "minimind3_tiny"})
                </option>
                {props.info.presets.map((name) => (
                  <option key={name}>{name}</option>
                ))}
              </select>
            </Field>
          )}
          {form?.options.some((option) => option.name === "EPOCHS") && (
            <Field label={t("recipe")}>
              <select value={request.recipe} onChange={(event) => change({ recipe: event.currentTarget.value })}>
                <option value="">{t("ownRecipe")}</option>
                {props.info.recipes.map((name) => (
                  <option key={name}>{name}</option>
                ))}
              </select>
            </Field>
          )}
          {Object.entries(form?.inputs ?? {}).map(([name, required]) => (
            <Input
              key={name}
              name={name as Key}
              required={required}
              empty={name === "data" && trains ? t("sampleData") : t("none")}
              value={request[name as "data"]}
              change={(value) => change({ [name]: value })}
            />
          ))}
        </div>
        <Devices info={props.info} request={request} change={change} />
        {form && <Options options={form.options} values={values} setValues={setValues} />}
      </fieldset>
      {error && (
        <p class="notice bad pre" role="alert">
          {error}
        </p>
      )}
      <div class="row">
        <button class="primary" type="submit" disabled={checks || !form}>
          {checks ? t("reviewing") : t("review")}
        </button>
      </div>
      {reviewed && <Review plan={reviewed.plan} start={start} back={() => setReviewed(undefined)} />}
    </form>
  );
}

const LISTS: Record<string, [path: string, key: string]> = {
  data: ["/api/datasets", "datasets"],
  tokenizer: ["/api/tokenizers", "tokenizers"],
};
const WEIGHTS: [string, string] = ["/api/checkpoints", "checkpoints"];

/** A choice of a file that the manager lists. */
function Input(props: {
  name: Key;
  required: boolean;
  empty: string;
  value: string;
  change: (value: string) => void;
}): JSX.Element {
  const t = useText();
  const [rows, setRows] = useState<FileEntry[]>([]);
  useEffect(() => {
    const [path, key] = LISTS[props.name] ?? WEIGHTS;
    get<Record<string, FileEntry[]>>(path).then(
      (found) => setRows(found[key]!),
      () => undefined,
    );
  }, [props.name]);
  return (
    <Field label={props.required ? `${t(props.name)} (${t("required")})` : t(props.name)}>
      <select
        required={props.required}
        value={props.value}
        onChange={(event) => props.change(event.currentTarget.value)}
        title={props.value}
      >
        <option value="">{props.empty}</option>
        {rows.map((row) => (
          <option key={row.path} value={row.path}>
            {tail(row.path)}
            {row.size_mb >= 0.1 ? ` (${row.size_mb.toFixed(1)} MiB)` : ""}
          </option>
        ))}
      </select>
    </Field>
  );
}

function Devices(props: {
  info: Info;
  request: JobRequest;
  change: (changes: Partial<JobRequest>) => void;
}): JSX.Element | null {
  const t = useText();
  const { info, request, change } = props;
  if (!info.devices.length) return null;
  const onCpu = request.device === "cpu";
  const toggle = (number: number, chosen: boolean) =>
    change({ devices: chosen ? [...request.devices, number] : request.devices.filter((other) => other !== number) });
  return (
    <fieldset class="card">
      <legend>{t("devices")}</legend>
      <div class="row">
        {info.devices.map((number) => (
          <Check
            key={number}
            label={`${info.device} ${number}`}
            checked={!onCpu && request.devices.includes(number)}
            onChange={(chosen) => {
              change({ device: "" });
              toggle(number, chosen);
            }}
          />
        ))}
        <Check
          label="CPU"
          checked={onCpu}
          onChange={(chosen) => change({ device: chosen ? "cpu" : "", devices: [] })}
        />
      </div>
    </fieldset>
  );
}

function Options(props: { options: Option[]; values: Values; setValues: (values: Values) => void }): JSX.Element {
  const t = useText();
  const [query, setQuery] = useState("");
  const set = (name: string, value: string | boolean) => props.setValues({ ...props.values, [name]: value });
  const group = (name: string) => props.options.filter((option) => option.group === name);
  const more = group("more").filter(
    (option) => option.name.includes(query) || option.help.toLowerCase().includes(query.toLowerCase()),
  );
  const isGiven = (option: Option) => ![undefined, "", false].includes(props.values[option.name]);
  const shown = [...more.filter(isGiven), ...more.filter((option) => !isGiven(option))].slice(0, MOST);
  const grid = (options: Option[]) => (
    <div class="grid">
      {options.map((option) => (
        <OptionField key={option.name} option={option} value={props.values[option.name]} set={set} />
      ))}
    </div>
  );
  return (
    <>
      {GROUPS.filter((name) => group(name).length).map((name) => (
        <details class="card" key={name} open={name === "main"}>
          <summary>{t(name)}</summary>
          {grid(group(name))}
        </details>
      ))}
      {group("more").length > 0 && (
        <details class="card">
          <summary>{t("more")}</summary>
          <Field label={t("find")} hint={t("found", { shown: shown.length, all: group("more").length })}>
            <input type="search" value={query} onInput={(event) => setQuery(event.currentTarget.value)} />
          </Field>
          {grid(shown)}
        </details>
      )}
    </>
  );
}

function OptionField(props: {
  option: Option;
  value: string | boolean | undefined;
  set: (name: string, value: string | boolean) => void;
}): JSX.Element {
  const { option, set } = props;
  const t = useText();
  const name = label(t, option.name);
  const hint = description(option);
  const id = `help-${option.name}`;
  if (option.kind === "flag")
    return (
      <div class="field">
        <span>{name}</span>
        <Check label={t("given")} checked={props.value === true} onChange={(value) => set(option.name, value)} />
        {hint && <small>{hint}</small>}
      </div>
    );
  const value = String(props.value ?? "");
  return (
    <div class="field">
      <label class="field">
        <span>
          {name}
          {name !== option.name && <code class="hint"> {option.name}</code>}
        </span>
        {option.kind === "choice" ? (
          <select
            value={value}
            aria-describedby={hint && id}
            onChange={(event) => set(option.name, event.currentTarget.value)}
          >
            <option value="">{option.default ? `${t("default")} (${option.default})` : t("default")}</option>
            {option.choices.map((choice) => (
              <option key={choice}>{choice}</option>
            ))}
          </select>
        ) : (
          <input
            inputMode={option.kind === "int" ? "numeric" : "decimal"}
            value={value}
            placeholder={option.default}
            aria-describedby={hint && id}
            onInput={(event) => set(option.name, event.currentTarget.value.trim())}
          />
        )}
      </label>
      {hint && <small id={id}>{hint}</small>}
    </div>
  );
}

/** What the dry run says; a job starts only from here. */
function Review(props: { plan: Plan; start: () => void; back: () => void }): JSX.Element {
  const t = useText();
  const { plan } = props;
  const dialog = useRef<HTMLDialogElement>(null);
  useEffect(() => dialog.current?.showModal(), []);
  const facts = [...FACTS, ...Object.keys(plan.facts)].filter((name) => name in plan.facts);
  return (
    <dialog ref={dialog} onClose={props.back} aria-labelledby="review-title">
      <h2 id="review-title">{t("reviewTitle")}</h2>
      <p>{t("reviewText")}</p>
      <dl class="pairs">
        {[...new Set(facts)].map((name) => (
          <div key={name}>
            <dt>{label(t, name)}</dt>
            <dd>{plan.facts[name]}</dd>
          </div>
        ))}
      </dl>
      <h3>{t("command")}</h3>
      <pre class="commands" tabIndex={0}>
        {plan.commands.join("\n")}
      </pre>
      {plan.output && (
        <details>
          <summary>{t("wholeOutput")}</summary>
          <pre class="commands" tabIndex={0}>
            {plan.output}
          </pre>
        </details>
      )}
      <div class="row end">
        <button type="button" onClick={() => dialog.current?.close()}>
          {t("back")}
        </button>
        <button class="primary" type="button" onClick={props.start}>
          {t("start")}
        </button>
      </div>
    </dialog>
  );
}
