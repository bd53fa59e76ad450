import type { ComponentChildren, JSX } from "preact";
import { useState } from "preact/hooks";
import { language, useWords, type Words } from "./i18n";
import { useStore } from "./store";
import { theme, type Theme } from "./theme";

const WORDS = {
  theme: ["Theme", "主题"],
  system: ["System", "跟随系统"],
  light: ["Light", "浅色"],
  dark: ["Dark", "深色"],
  other: ["中文", "English"],
  copy: ["Copy", "复制"],
  copied: ["Copied", "已复制"],
} satisfies Words<string>;

/** The button that changes between Chinese and English. */
export function LanguageSwitch(): JSX.Element {
  const t = useWords(WORDS);
  const next = useStore(language) === "zh" ? "en" : "zh";
  return (
    <button class="quiet" type="button" lang={next} onClick={() => language.set(next)}>
      {t("other")}
    </button>
  );
}

/** The choice of light, dark, or the system's theme. */
export function ThemeSwitch(): JSX.Element {
  const t = useWords(WORDS);
  const value = useStore(theme);
  return (
    <select
      class="quiet"
      aria-label={t("theme")}
      value={value}
      onChange={(event) => theme.set(event.currentTarget.value as Theme)}
    >
      {(["system", "light", "dark"] as const).map((name) => (
        <option key={name} value={name}>
          {t(name)}
        </option>
      ))}
    </select>
  );
}

/** The bar at the top of a page. */
export function Header(props: { title: string; children?: ComponentChildren }): JSX.Element {
  return (
    <header class="bar">
      <h1>{props.title}</h1>
      <div class="bar-tools">
        {props.children}
        <LanguageSwitch />
        <ThemeSwitch />
      </div>
    </header>
  );
}

/** An input with its label above and an optional hint below. */
export function Field(props: { label: string; hint?: string; children: ComponentChildren }): JSX.Element {
  return (
    <label class="field">
      <span>{props.label}</span>
      {props.children}
      {props.hint && <small>{props.hint}</small>}
    </label>
  );
}

/** A checkbox with its label. */
export function Check(props: {
  label: ComponentChildren;
  checked: boolean;
  onChange: (checked: boolean) => void;
}): JSX.Element {
  return (
    <label class="check">
      <input type="checkbox" checked={props.checked} onChange={(e) => props.onChange(e.currentTarget.checked)} />
      <span>{props.label}</span>
    </label>
  );
}

/** A button that puts a text into the clipboard. */
export function CopyButton(props: { text: () => string }): JSX.Element {
  const t = useWords(WORDS);
  const [done, setDone] = useState(false);
  const copy = async () => {
    await copyText(props.text());
    setDone(true);
    setTimeout(() => setDone(false), 1500);
  };
  return (
    <button class="quiet" type="button" onClick={copy}>
      {done ? t("copied") : t("copy")}
    </button>
  );
}

/** Copy a text. Browsers have no clipboard API on pages that come over http from another host. */
async function copyText(text: string): Promise<void> {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}
