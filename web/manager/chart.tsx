import type { JSX } from "preact";
import { useEffect, useRef } from "preact/hooks";
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";
import { useStore } from "../shared/store";
import { theme } from "../shared/theme";
import { short } from "./format";
import { useText } from "./words";

/** A curve: points of iteration and value. */
export interface Curve {
  label: string;
  points: [number, number][];
}

const HEIGHT = 260;
// Iterations are whole numbers.
const STEPS = Array.from({ length: 8 }, (_, power) => [1, 2, 5].map((digit) => digit * 10 ** power)).flat();

/** Curves over a common axis of iterations. */
function aligned(curves: Curve[]): uPlot.AlignedData {
  const places = [...new Set(curves.flatMap((curve) => curve.points.map(([x]) => x)))].sort((a, b) => a - b);
  const columns = curves.map((curve) => {
    const values = new Map(curve.points);
    return places.map((x) => values.get(x) ?? null);
  });
  return [places, ...columns];
}

/** Curves of one metric. Screen readers get the last values as text. */
function Chart(props: { label: string; curves: Curve[] }): JSX.Element {
  const box = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | undefined>(undefined);
  const chosen = useStore(theme);
  const names = props.curves.map((curve) => curve.label).join("\n");

  useEffect(() => {
    const place = box.current!;
    const system = matchMedia("(prefers-color-scheme: dark)");
    const draw = () => {
      plot.current?.destroy();
      plot.current = new uPlot(options(place, props.curves), aligned(props.curves), place);
    };
    draw();
    const resized = new ResizeObserver(() => {
      if (plot.current?.width !== place.clientWidth) plot.current?.setSize({ width: place.clientWidth, height: HEIGHT });
    });
    resized.observe(place);
    system.addEventListener("change", draw);
    return () => {
      resized.disconnect();
      system.removeEventListener("change", draw);
      plot.current?.destroy();
      plot.current = undefined;
    };
  }, [names, chosen]);
  useEffect(() => plot.current?.setData(aligned(props.curves)), [props.curves]);

  const last = props.curves.map((curve) => `${curve.label} ${short(curve.points.at(-1)?.[1])}`).join(", ");
  return <div class="chart" ref={box} role="img" aria-label={`${props.label}: ${last}`} />;
}

function options(place: HTMLElement, curves: Curve[]): uPlot.Options {
  const style = getComputedStyle(place);
  // Canvas knows no light-dark(): a property of an element gives the colour that it stands for.
  const colour = (name: string) => {
    place.style.outlineColor = `var(${name})`;
    const found = style.outlineColor;
    place.style.outlineColor = "";
    return found;
  };
  const axis: uPlot.Axis = {
    stroke: colour("--muted"),
    grid: { stroke: colour("--line"), width: 1 },
    ticks: { stroke: colour("--line"), width: 1 },
    font: "12px system-ui, sans-serif",
  };
  return {
    width: place.clientWidth || 600,
    height: HEIGHT,
    scales: { x: { time: false } },
    axes: [
      { ...axis, incrs: STEPS },
      { ...axis, size: 60, values: (_, ticks) => ticks.map((tick) => String(Number(tick.toPrecision(5)))) },
    ],
    series: [
      { label: "iteration" },
      ...curves.map((curve, number) => ({
        label: curve.label,
        stroke: colour(`--series-${(number % 4) + 1}`),
        width: 2,
        dash: number >= 4 ? [6, 4] : [],
        spanGaps: true,
        points: { show: curve.points.length < 40, size: 5 },
        value: (_: uPlot, value: number | null) => (value === null ? "–" : short(value)),
      })),
    ],
    legend: { live: true },
    cursor: { points: { size: 7 } },
  };
}

/** A card with curves of one metric, and the list to choose the metric from. */
export function ChartCard(props: {
  label: string;
  names: string[];
  column: string;
  curves: Curve[];
  onChoose: (name: string) => void;
}): JSX.Element {
  const t = useText();
  return (
    <section class="card" aria-labelledby="curves-title">
      <div class="card-head">
        <h3 id="curves-title">{t("curves")}</h3>
        {props.names.length > 0 && (
          <select
            aria-label={t("column")}
            value={props.column}
            onChange={(event) => props.onChoose(event.currentTarget.value)}
          >
            {props.names.map((name) => (
              <option key={name}>{name}</option>
            ))}
          </select>
        )}
      </div>
      {props.names.length ? (
        <Chart label={props.label} curves={props.curves} />
      ) : (
        <p class="hint">{t("noRows")}</p>
      )}
    </section>
  );
}
