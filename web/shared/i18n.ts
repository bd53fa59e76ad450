import { kept, useStore } from "./store";

export type Language = "en" | "zh";

function preferred(): Language {
  return navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
}

export const language = kept<Language>("minimind.language", preferred());

function apply(): void {
  document.documentElement.lang = language.value === "zh" ? "zh-CN" : "en";
}
language.subscribe(apply);
apply();

/** The words of a page: an English and a Chinese text for each key. */
export type Words<Key extends string> = Record<Key, readonly [en: string, zh: string]>;

/** Words of a page in the current language; `{name}` in a text is replaced by the value of that name. */
export type Translate<Key extends string> = (key: Key, values?: Record<string, string | number>) => string;

/** Hook that translates; the component re-renders when the language changes. */
export function useWords<Key extends string>(words: Words<Key>): Translate<Key> {
  const index = useStore(language) === "zh" ? 1 : 0;
  return (key, values = {}) =>
    words[key][index].replace(/\{(\w+)\}/g, (whole, name: string) => String(values[name] ?? whole));
}
