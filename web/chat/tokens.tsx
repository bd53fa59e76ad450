import type { JSX } from "preact";
import { useState } from "preact/hooks";
import { useWords } from "../shared/i18n";
import type { Alternative, Token } from "./server";
import { WORDS } from "./words";

const STEPS: Record<string, number> = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };

function percent(probability: number): string {
  return `${(100 * probability).toFixed(probability < 0.1 ? 2 : 1)} %`;
}

/** The text of a token with its white space visible; the bytes of a part of a character. */
function shown({ text, bytes }: Alternative): string {
  if (text.includes("\ufffd") && bytes.length) {
    return bytes.map((byte) => byte.toString(16).toUpperCase().padStart(2, "0")).join(" ");
  }
  return text.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";
}

/** Tokens one by one; the one that is pointed at, or has the focus, shows its id and its alternatives. */
export function Tokens(props: { tokens: Token[]; label: string }): JSX.Element {
  const t = useWords(WORDS);
  const [picked, pick] = useState<number | undefined>(undefined);
  const move = (event: KeyboardEvent, list: HTMLElement) => {
    const step = STEPS[event.key];
    if (!step) return;
    event.preventDefault();
    const buttons = list.querySelectorAll("button");
    buttons[Math.min(Math.max((picked ?? -1) + step, 0), buttons.length - 1)]?.focus();
  };
  const token = picked === undefined ? undefined : props.tokens[picked];
  return (
    <div class="tokens">
      <div class="token-list mono" role="group" aria-label={props.label} onKeyDown={(event) => move(event, event.currentTarget)}>
        {props.tokens.map((one, n) => (
          <button
            key={n}
            type="button"
            class={`token${n === picked ? " picked" : ""}`}
            tabIndex={n === (picked ?? 0) ? 0 : -1}
            style={{ "--doubt": `${(45 * (1 - one.probability)).toFixed(0)}%` }}
            onMouseEnter={() => pick(n)}
            onFocus={() => pick(n)}
          >
            {shown(one)}
          </button>
        ))}
      </div>
      <div class="token-detail">
        {!token && <small>{t("pickToken")}</small>}
        {token && (
          <dl class="token-facts">
            <dt>{t("token")}</dt>
            <dd class="mono">{shown(token)}</dd>
            <dt>{t("id")}</dt>
            <dd class="mono">{token.id ?? "–"}</dd>
            {token.top.length > 0 && <dt>{t("probability")}</dt>}
            {token.top.length > 0 && <dd class="mono">{percent(token.probability)}</dd>}
          </dl>
        )}
        {token && token.top.length > 0 && (
          <ol class="alternatives">
            {token.top.map((other, n) => (
              <li key={n} class={other.text === token.text ? "chosen" : ""}>
                <span class="mono">{shown(other)}</span>
                <span class="probability-bar" style={{ "--share": `${100 * other.probability}%` }} />
                <span class="mono">{percent(other.probability)}</span>
              </li>
            ))}
          </ol>
        )}
      </div>
    </div>
  );
}
