/** A text in English and Chinese. */
export type Text = readonly [en: string, zh: string];

const chinese = document.documentElement.lang.startsWith("zh");

/** The text in the language of the page; `{name}` is replaced by the value of that name. */
export function t(text: Text, values: Record<string, string | number> = {}): string {
  return text[chinese ? 1 : 0].replace(/\{(\w+)\}/g, (whole, name: string) => String(values[name] ?? whole));
}

/** A number with up to `digits` significant digits. */
export function short(value: number, digits = 3): string {
  return Number.isFinite(value) ? String(Number(value.toPrecision(digits))) : "–";
}

/** A whole number with separators of thousands. */
export function whole(value: number): string {
  return Math.round(value).toLocaleString("en-US");
}

/** Bytes in KiB, MiB or GiB. */
export function bytes(value: number): string {
  const power = value >= 2 ** 30 ? 3 : value >= 2 ** 20 ? 2 : value >= 2 ** 10 ? 1 : 0;
  return `${short(value / 2 ** (10 * power))} ${["B", "KiB", "MiB", "GiB"][power]}`;
}

/** A token as it is shown: blanks and line breaks are visible. */
export function visible(token: string): string {
  return token.replaceAll("\n", "⏎").replaceAll(" ", "␣").replaceAll("\t", "⇥");
}
