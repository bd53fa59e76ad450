import type { JSX } from "preact";
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { Check } from "../shared/widgets";
import { useText } from "./words";

const SHOWN = 1500; // lines in the page; more make it slow

/** The end of a log, with a search. Lines are inserted as text only. */
export function Log(props: { lines: string[] }): JSX.Element {
  const t = useText();
  const [query, setQuery] = useState("");
  const [onlyMatches, setOnlyMatches] = useState(false);
  const [follows, setFollows] = useState(true);
  const box = useRef<HTMLDivElement>(null);
  const wanted = query.toLowerCase();
  const found = useMemo(
    () => (wanted ? props.lines.filter((line) => line.toLowerCase().includes(wanted)) : []),
    [props.lines, wanted],
  );
  const shown = (wanted && onlyMatches ? found : props.lines).slice(-SHOWN);
  useEffect(() => {
    if (follows && box.current) box.current.scrollTop = box.current.scrollHeight;
  }, [shown, follows]);
  return (
    <section class="card" aria-labelledby="log-title">
      <div class="card-head">
        <h3 id="log-title">{t("log")}</h3>
        <div class="row">
          <input
            type="search"
            placeholder={t("search")}
            aria-label={t("search")}
            value={query}
            onInput={(event) => setQuery(event.currentTarget.value)}
          />
          <Check label={t("onlyMatches")} checked={onlyMatches} onChange={setOnlyMatches} />
          <Check label={t("follow")} checked={follows} onChange={setFollows} />
        </div>
      </div>
      <p class="hint" role="status">
        {wanted ? t("matches", { count: found.length }) : ""}
      </p>
      <div class="log mono" ref={box} tabIndex={0} role="region" aria-label={t("log")}>
        {shown.map((line, number) => (
          <Line key={number} text={line} wanted={wanted} />
        ))}
      </div>
    </section>
  );
}

function Line(props: { text: string; wanted: string }): JSX.Element {
  // A terminal shows what follows the last carriage return.
  const text = props.text.slice(props.text.replace(/\r+$/, "").lastIndexOf("\r") + 1);
  const kind = /^error:|Traceback|Error:/.test(text)
    ? "bad"
    : /^warning:/.test(text)
      ? "warn"
      : /^(\+ |== )/.test(text)
        ? "mark"
        : "";
  const place = props.wanted ? text.toLowerCase().indexOf(props.wanted) : -1;
  if (place < 0) return <div class={kind}>{text || " "}</div>;
  const end = place + props.wanted.length;
  return (
    <div class={kind}>
      {text.slice(0, place)}
      <mark>{text.slice(place, end)}</mark>
      {text.slice(end)}
    </div>
  );
}
