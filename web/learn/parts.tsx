import type { ComponentChildren, JSX } from "preact";
import { useId } from "preact/hooks";
import { visible } from "./text";

/** A row of controls. `one`: a single list with long entries. */
export function Controls(props: { children: ComponentChildren; one?: boolean }): JSX.Element {
  return <div class={`controls${props.one ? " one" : ""}`}>{props.children}</div>;
}

/** A slider with its value. */
export function Slider(props: {
  label: string;
  value: number;
  min: number;
  max: number;
  step?: number;
  shown?: string;
  onChange: (value: number) => void;
}): JSX.Element {
  const id = useId();
  return (
    <div class="control">
      <label for={id}>
        {props.label} <output>{props.shown ?? props.value}</output>
      </label>
      <input
        id={id}
        type="range"
        min={props.min}
        max={props.max}
        step={props.step ?? 1}
        value={props.value}
        aria-valuetext={props.shown}
        onInput={(event) => props.onChange(Number(event.currentTarget.value))}
      />
    </div>
  );
}

/** A list to choose from. */
export function Select<T extends string | number>(props: {
  label: string;
  value: T;
  options: readonly (readonly [value: T, label: string])[];
  onChange: (value: T) => void;
}): JSX.Element {
  const id = useId();
  return (
    <div class="control">
      <label for={id}>{props.label}</label>
      <select
        id={id}
        value={String(props.value)}
        onChange={(event) => {
          const found = props.options.find(([value]) => String(value) === event.currentTarget.value);
          if (found) props.onChange(found[0]);
        }}
      >
        {props.options.map(([value, label]) => (
          <option key={value} value={String(value)}>
            {label}
          </option>
        ))}
      </select>
    </div>
  );
}

/** A sequence of tokens, each a button if there is something to choose. */
export function Tokens(props: {
  pieces: readonly string[];
  label: string;
  chosen?: number;
  kind?: (place: number) => string;
  hint?: (place: number) => string;
  onChoose?: (place: number) => void;
}): JSX.Element {
  return (
    <div class="tokens" role="group" aria-label={props.label}>
      {props.pieces.map((piece, place) => {
        const kind = `token ${props.kind?.(place) ?? ""}`;
        const hint = props.hint?.(place);
        return props.onChoose ? (
          <button
            type="button"
            key={place}
            class={kind}
            title={hint}
            aria-pressed={place === props.chosen}
            onClick={() => props.onChoose!(place)}
          >
            {visible(piece)}
          </button>
        ) : (
          <span key={place} class={kind} title={hint}>
            {visible(piece)}
          </span>
        );
      })}
    </div>
  );
}

/** Horizontal bars of values from 0 to 1, or to the largest. */
export function Bars(props: {
  label: string;
  rows: readonly { name: string; value: number; text: string; faint?: boolean }[];
  most?: number;
}): JSX.Element {
  const most = props.most ?? Math.max(...props.rows.map((row) => Math.abs(row.value)), 1e-12);
  return (
    <table class="bars">
      <caption>{props.label}</caption>
      <tbody>
        {props.rows.map((row, place) => (
          <tr key={place} class={row.faint ? "faint" : ""}>
            <th scope="row">{row.name}</th>
            <td class="bar-cell" aria-hidden="true">
              <svg width="100%" height="12">
                <rect
                  class={row.value < 0 ? "negative" : "positive"}
                  height="12"
                  width={`${Math.min(100, (100 * Math.abs(row.value)) / most)}%`}
                />
              </svg>
            </td>
            <td class="number">{row.text}</td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}

export interface Line {
  name: string;
  points: readonly (readonly [x: number, y: number])[];
  dots?: boolean;
}

const WIDTH = 640;
const HEIGHT = 240;
const LEFT = 58;
const RIGHT = 20; // half of the last number below the axis
const BOTTOM = 24;

/** Round numbers between two values. */
function ticks(from: number, to: number): number[] {
  const raw = (to - from) / 4 || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * ([1, 2, 5, 10].find((digit) => digit * power >= raw) ?? 10);
  const found: number[] = [];
  for (let value = Math.ceil(from / step) * step; value <= to + step * 1e-6; value += step) found.push(value);
  return found;
}

/** Curves. They are SVG, so that their colours follow the theme of the page. The label tells what they show. */
export function Lines(props: {
  label: string;
  x: string;
  lines: readonly Line[];
  mark?: readonly [x: number, y: number];
  least?: number;
}): JSX.Element {
  const all = props.lines.flatMap((line) => line.points);
  const xs = all.map(([x]) => x);
  const ys = [...all.map(([, y]) => y), ...(props.least === undefined ? [] : [props.least])];
  const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const px = (x: number) => LEFT + ((x - x0) / (x1 - x0 || 1)) * (WIDTH - LEFT - RIGHT);
  const py = (y: number) => HEIGHT - BOTTOM - ((y - y0) / (y1 - y0 || 1)) * (HEIGHT - BOTTOM - 10);
  const number = (value: number) => String(Number(value.toPrecision(6)));
  return (
    <figure class="plot">
      <svg viewBox={`0 0 ${WIDTH} ${HEIGHT}`} role="img" aria-label={props.label}>
        {ticks(y0, y1).map((y) => (
          <g key={`y${y}`}>
            <line class="grid" x1={LEFT} x2={WIDTH - RIGHT} y1={py(y)} y2={py(y)} />
            <text x={LEFT - 6} y={py(y) + 4} text-anchor="end">
              {number(y)}
            </text>
          </g>
        ))}
        {ticks(x0, x1).map((x) => (
          <text key={`x${x}`} x={px(x)} y={HEIGHT - 6} text-anchor="middle">
            {number(x)}
          </text>
        ))}
        {props.lines.map((line, place) =>
          line.dots ? (
            line.points.map(([x, y]) => <circle key={x} class={`series-${place}`} cx={px(x)} cy={py(y)} r="2.5" />)
          ) : (
            <polyline
              key={line.name}
              class={`line series-${place}`}
              points={line.points.map(([x, y]) => `${px(x).toFixed(1)},${py(y).toFixed(1)}`).join(" ")}
            />
          ),
        )}
        {props.mark && <circle class="mark" cx={px(props.mark[0])} cy={py(props.mark[1])} r="5" />}
      </svg>
      <figcaption>
        {props.lines.map((line, place) => (
          <span key={line.name} class={`legend series-${place}`}>
            {line.name}
          </span>
        ))}
        <span class="axis">{props.x}</span>
      </figcaption>
    </figure>
  );
}

/** A table with a head. */
export function Table(props: {
  caption?: string;
  head: readonly string[];
  rows: readonly (readonly ComponentChildren[])[];
}): JSX.Element {
  return (
    <div class="table-scroll" tabIndex={0} role="region" aria-label={props.caption ?? props.head.join(", ")}>
      <table class="data">
        {props.caption && <caption>{props.caption}</caption>}
        <thead>
          <tr>
            {props.head.map((cell) => (
              <th key={cell} scope="col">
                {cell}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {props.rows.map((row, number) => (
            <tr key={number}>
              {row.map((cell, column) => (
                <td key={column}>{cell}</td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

/** A result that screen readers announce when it changes. */
export function Result(props: { children: ComponentChildren }): JSX.Element {
  return (
    <p class="result" role="status">
      {props.children}
    </p>
  );
}
