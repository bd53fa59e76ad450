import type { JSX } from "preact";
import { useState } from "preact/hooks";
import { Bars, Controls, Lines, Result, Select, Slider, Table, Tokens } from "./parts";
import { short, t, visible } from "./text";

interface AttentionFigure {
  pieces: string[];
  weights: number[][][][]; // layer, head, query, key: per mille
}

const CELL = 16;

/** An attention map: choose the layer, the head and the query. */
export function AttentionWidget({ figure }: { figure: AttentionFigure }): JSX.Element {
  const [layer, setLayer] = useState(1);
  const [head, setHead] = useState(0);
  const [query, setQuery] = useState(figure.pieces.length - 3);
  const map = figure.weights[layer]![head]!;
  const size = figure.pieces.length * CELL;
  const row = map[query]!;
  const best = row.map((value, i) => ({ name: `${i} ${visible(figure.pieces[i]!)}`, value: value / 1000, text: `${(value / 10).toFixed(1)} %` })).sort((a, b) => b.value - a.value).slice(0, 8);
  return (
    <>
      <Controls>
        <Select label={t(["Layer", "层"])} value={layer} options={figure.weights.map((_, i) => [i, String(i)] as const)} onChange={setLayer} />
        <Select label={t(["Head", "头"])} value={head} options={figure.weights[0]!.map((_, i) => [i, String(i)] as const)} onChange={setHead} />
      </Controls>
      <p>{t(["Choose the token that asks (the query):", "选择发出查询的词元："])}</p>
      <Tokens pieces={figure.pieces} label={t(["Query", "查询"])} chosen={query} kind={(i) => (i <= query ? `heat-${Math.ceil(row[i]! / 125)}` : "later")} hint={(i) => (i <= query ? `${row[i]! / 10} %` : "")} onChoose={setQuery} />
      <div class="side-by-side">
        <figure class="plot">
          <svg viewBox={`-2 -2 ${size + 4} ${size + 4}`} role="img" aria-label={t(["Attention map of layer {layer}, head {head}: a row for each query, a column for each key", "第 {layer} 层第 {head} 个头的注意力图：每行一个查询，每列一个键"], { layer, head })}>
            {map.map((values, q) =>
              values.map((value, k) => (
                <rect key={`${q} ${k}`} class="heat" x={k * CELL} y={q * CELL} width={CELL - 1} height={CELL - 1} fill-opacity={0.04 + value / 1042} onClick={() => setQuery(q)}>
                  <title>{`${visible(figure.pieces[q]!)} → ${visible(figure.pieces[k]!)}: ${value / 10} %`}</title>
                </rect>
              )),
            )}
            <rect class="frame" x="-1" y={query * CELL - 1} width={(query + 1) * CELL + 1} height={CELL + 1} />
          </svg>
          <figcaption>{t(["Row: query. Column: key. Nothing lies above the diagonal.", "行：查询。列：键。对角线以上没有值。"])}</figcaption>
        </figure>
        <Bars label={t(["Where “{token}” looks", "“{token}” 看向哪里"], { token: visible(figure.pieces[query]!) })} most={1} rows={best} />
      </div>
      <Result>{t(["The weights of this row sum to {sum} %.", "这一行的权重之和为 {sum} %。"], { sum: (row.reduce((a, b) => a + b, 0) / 10).toFixed(1) })}</Result>
    </>
  );
}

interface RopeFigure {
  theta: number;
  models: Record<string, { head_dim: number; frequencies: number[]; yarn: number[] }>;
  factor: number;
  trained_length: number;
  query: number[];
  key: number[];
  scale: number;
}

/** Rotate each pair (i, i + n/2) by position times its frequency. */
function rotated(x: readonly number[], position: number, frequencies: readonly number[]): number[] {
  const half = x.length / 2;
  return x.map((value, i) => {
    const angle = position * frequencies[i % half]!;
    return i < half ? value * Math.cos(angle) - x[i + half]! * Math.sin(angle) : value * Math.cos(angle) + x[i - half]! * Math.sin(angle);
  });
}

/** The rotation of the pairs of a real query and key, the score, and YaRN. */
export function RopeWidget({ figure }: { figure: RopeFigure }): JSX.Element {
  const tiny = figure.models["minimind3_tiny"]!;
  const [m, setM] = useState(12);
  const [n, setN] = useState(7);
  const [pair, setPair] = useState(0);
  const [yarn, setYarn] = useState<"off" | "on">("off");
  const frequencies = tiny.frequencies.map((value, i) => value * (yarn === "on" ? tiny.yarn[i]! : 1));
  const score = (a: number, b: number) => {
    const [q, k] = [rotated(figure.query, a, frequencies), rotated(figure.key, b, frequencies)];
    return figure.scale * q.reduce((sum, value, i) => sum + value * k[i]!, 0);
  };
  const distances = Array.from({ length: 129 }, (_, i) => i);
  const turns = frequencies[pair]! * figure.trained_length / (2 * Math.PI);
  const arrow = (x: readonly number[], position: number, kind: string) => {
    const turned = rotated(x, position, frequencies);
    const [a, b] = [turned[pair]!, turned[pair + x.length / 2]!];
    const length = Math.hypot(a, b) || 1;
    return <line class={kind} x1="0" y1="0" x2={(80 * a) / length} y2={(-80 * b) / length} />;
  };
  return (
    <>
      <Controls>
        <Slider label={t(["Position of the query", "查询的位置"])} value={m} min={0} max={128} onChange={setM} />
        <Slider label={t(["Position of the key", "键的位置"])} value={n} min={0} max={128} onChange={setN} />
        <Slider label={t(["Pair", "维度对"])} value={pair} min={0} max={tiny.head_dim / 2 - 1} onChange={setPair} />
        <Select label="YaRN" value={yarn} options={[["off", t(["off (training)", "关（训练时）"])], ["on", t(["on (×16)", "开（16 倍）"])]]} onChange={setYarn} />
      </Controls>
      <div class="side-by-side">
        <figure class="plot small">
          <svg viewBox="-100 -100 200 200" role="img" aria-label={t(["Directions of pair {pair} of the query and the key", "查询与键的第 {pair} 对的方向"], { pair })}>
            <circle class="grid hollow" cx="0" cy="0" r="80" />
            {arrow(figure.query, m, "arrow series-0")}
            {arrow(figure.key, n, "arrow series-1")}
          </svg>
          <figcaption>
            <span class="legend series-0">{t(["query", "查询"])}</span>
            <span class="legend series-1">{t(["key", "键"])}</span>
          </figcaption>
        </figure>
        <Lines label={t(["Score by distance", "分数随距离的变化"])} x={t(["distance m − n", "距离 m − n"])} lines={[{ name: t(["score q·k/√d", "分数 q·k/√d"]), points: distances.map((d) => [d, score(d, 0)] as const) }]} mark={m >= n ? [m - n, score(m, n)] : undefined} />
      </div>
      <Result>
        {t(["Score at ({m}, {n}): {one}. Both moved by 100: {other}. Pair {pair} turns by {angle} rad per position, {turns} times in {length} tokens.", "位置 ({m}, {n}) 的分数：{one}。两者都移动 100：{other}。第 {pair} 对每个位置转 {angle} 弧度，在 {length} 个词元内转 {turns} 圈。"], {
          m, n, one: score(m, n).toFixed(4), other: score(m + 100, n + 100).toFixed(4), pair, angle: short(frequencies[pair]!), turns: short(turns), length: figure.trained_length,
        })}
      </Result>
      <Lines label={t(["What YaRN multiplies each frequency by", "YaRN 给每个频率乘的系数"])} x={t(["pair / number of pairs", "维度对 / 对数"])} least={0} lines={Object.entries(figure.models).map(([name, model]) => ({ name, points: model.yarn.map((value, i) => [i / model.yarn.length, value] as const) }))} />
    </>
  );
}

interface NormFigure {
  token: string;
  eps: number;
  input: number[];
  weight: number[];
  output: number[];
  gate: number[];
  up: number[];
  product: number[];
}

const silu = (x: number) => x / (1 + Math.exp(-x));

/** RMSNorm and SwiGLU on the numbers of one token. */
export function NormWidget({ figure }: { figure: NormFigure }): JSX.Element {
  const [scale, setScale] = useState(1);
  const [unit, setUnit] = useState(0);
  const x = figure.input.map((value) => value * scale);
  const rms = Math.sqrt(x.reduce((sum, value) => sum + value * value, 0) / x.length + figure.eps);
  const y = x.map((value, i) => (figure.weight[i]! * value) / rms);
  const worst = Math.max(...y.map((value, i) => Math.abs(value - figure.output[i]!)));
  const [gate, up] = [figure.gate[unit]!, figure.up[unit]!];
  const curve = Array.from({ length: 81 }, (_, i) => -8 + i / 5);
  return (
    <>
      <Controls>
        <Slider label={t(["Multiply the input by", "输入乘以"])} value={scale} min={0.1} max={10} step={0.1} onChange={setScale} />
      </Controls>
      <Result>
        {t(["Root mean square {rms}. Largest difference from the model's own output: {worst}.", "均方根 {rms}。与模型自己的输出相差最多 {worst}。"], { rms: short(rms, 4), worst: short(worst, 2) })}
      </Result>
      <Table head={["i", "x", "weight", "weight · x / rms", t(["output of the model", "模型的输出"])]} rows={[0, 1, 2, 3, 4].map((i) => [i, short(x[i]!, 4), short(figure.weight[i]!, 4), short(y[i]!, 4), short(figure.output[i]!, 4)])} />
      <Controls>
        <Slider label={t(["Unit of the MLP", "MLP 的单元"])} value={unit} min={0} max={figure.gate.length - 1} onChange={setUnit} />
      </Controls>
      <Lines label={t(["silu, and the gate of unit {unit}", "silu 函数与第 {unit} 个单元的门"], { unit })} x="gate" lines={[{ name: "silu(gate)", points: curve.map((value) => [value, silu(value)] as const) }]} mark={Math.abs(gate) <= 8 ? [gate, silu(gate)] : undefined} />
      <Result>
        {t(["silu({gate}) × {up} = {product}; the model has {model}.", "silu({gate}) × {up} = {product}；模型的值是 {model}。"], { gate, up, product: (silu(gate) * up).toFixed(3), model: figure.product[unit]!.toFixed(3) })}
      </Result>
    </>
  );
}

interface MoeFigure {
  pieces: string[];
  models: { rule: string; shares: number[][][]; gradient: Record<string, number> }[];
}

/** Which expert each token goes to, with and without a gradient for the router. */
export function MoeWidget({ figure }: { figure: MoeFigure }): JSX.Element {
  const [which, setWhich] = useState(0);
  const [layer, setLayer] = useState(2);
  const [token, setToken] = useState(7);
  const model = figure.models[which]!;
  const rows = model.shares[layer]!;
  const expert = (row: readonly number[]) => row.indexOf(Math.max(...row));
  const loads = rows[0]!.map((_, e) => rows.filter((row) => expert(row) === e).length / rows.length);
  const sure = rows.reduce((sum, row) => sum + Math.max(...row), 0) / rows.length / 10;
  return (
    <>
      <Controls>
        <Select label={t(["Trained with router weight", "训练时的路由权重"])} value={which} options={figure.models.map((one, i) => [i, one.rule] as const)} onChange={setWhich} />
        <Select label={t(["Layer", "层"])} value={layer} options={model.shares.map((_, i) => [i, String(i)] as const)} onChange={setLayer} />
      </Controls>
      <Tokens pieces={figure.pieces} label={t(["Tokens, coloured by expert", "词元，颜色表示专家"])} chosen={token} kind={(i) => `expert-${expert(rows[i]!)}`} hint={(i) => t(["expert {e}", "专家 {e}"], { e: expert(rows[i]!) })} onChoose={setToken} />
      <div class="side-by-side">
        <Bars label={t(["Router's probabilities for “{token}”", "路由给 “{token}” 的概率"], { token: visible(figure.pieces[token]!) })} most={1} rows={rows[token]!.map((value, e) => ({ name: t(["expert {e}", "专家 {e}"], { e }), value: value / 1000, text: `${(value / 10).toFixed(1)} %`, faint: e !== expert(rows[token]!) }))} />
        <Bars label={t(["Share of these tokens by expert", "各专家得到的词元比例"])} most={1} rows={loads.map((value, e) => ({ name: t(["expert {e}", "专家 {e}"], { e }), value, text: `${(100 * value).toFixed(0)} %` }))} />
      </div>
      <Result>
        {t(["The chosen expert has a probability of {sure} % on average.", "被选中的专家平均概率为 {sure} %。"], { sure: sure.toFixed(1) })}
      </Result>
      <Table caption={t(["Norm of the router's gradient from the loss of this text", "这段文本的损失给路由的梯度范数"])} head={["router_weight", ...figure.models.map((one) => t(["model of {rule}", "{rule} 的模型"], { rule: one.rule }))]} rows={Object.keys(model.gradient).map((rule) => [<code>{rule}</code>, ...figure.models.map((one) => String(one.gradient[rule]))])} />
    </>
  );
}
