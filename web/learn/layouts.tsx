import type { JSX } from "preact";
import { useState } from "preact/hooks";
import { Bars, Controls, Result, Select, Slider, Table } from "./parts";
import { bytes, t, whole } from "./text";

interface Layout {
  tp: number;
  pp: number;
  vpp: number;
  ep: number;
  dp: number;
  layers: number[][][]; // stage, chunk
  parameters: number[]; // by mp_rank folder: stage, expert rank, tensor rank
  experts: [first: number, last: number][]; // by expert rank; empty without experts
  shapes: Record<string, number[]>;
  sent: Record<string, number>;
  memory: Record<string, number>;
  micro_batches: number;
}

interface Timeline {
  ranks: [kind: number, micro: number, chunk: number, start: number][][];
  end: number;
  bubble: number;
}

interface ParallelFigure {
  world: number;
  machine: string;
  models: Record<string, [layers: number, parameters: number]>;
  layouts: Record<string, Layout[]>;
  timelines: Record<string, Timeline>;
}

type Size = "tp" | "pp" | "vpp" | "ep";
const SIZES: Size[] = ["tp", "pp", "vpp", "ep"];

/** What a rank holds and sends in a layout of eight ranks, and the timeline of its pipeline. */
export function ParallelWidget({ figure }: { figure: ParallelFigure }): JSX.Element {
  const [name, setName] = useState("minimind3");
  const [sizes, setSizes] = useState<Record<Size, number>>({ tp: 2, pp: 2, vpp: 1, ep: 1 });
  const [rank, setRank] = useState(0);
  const [count, setCount] = useState(8);
  const all = figure.layouts[name]!;
  const layout = all.find((one) => SIZES.every((size) => one[size] === sizes[size]));
  // A choice that does not fit the others changes them as little as possible.
  const nearest = (layouts: Layout[], wanted: Record<Size, number>, fixed?: Size) =>
    layouts
      .filter((one) => !fixed || one[fixed] === wanted[fixed])
      .sort((a, b) => distance(a, wanted) - distance(b, wanted))[0]!;
  const choose = (size: Size) => (value: number) => {
    const found = nearest(all, { ...sizes, [size]: value }, size);
    setSizes({ tp: found.tp, pp: found.pp, vpp: found.vpp, ep: found.ep });
  };
  const shown = layout ?? nearest(all, sizes);
  const model = (value: string) => {
    const found = nearest(figure.layouts[value]!, sizes);
    setName(value);
    setSizes({ tp: found.tp, pp: found.pp, vpp: found.vpp, ep: found.ep });
  };
  // Megatron's order of ranks: tensor, then data (of which expert ranks are a part), then pipeline.
  const ranks = Array.from({ length: figure.world }, (_, i) => {
    const [tp, rest] = [i % shown.tp, Math.floor(i / shown.tp)];
    const [dp, pp] = [rest % shown.dp, Math.floor(rest / shown.dp)];
    return { tp, dp, pp, ep: dp % shown.ep };
  });
  const mine = ranks[rank]!;
  const folder = (one: (typeof ranks)[number]) => (one.pp * shown.ep + one.ep) * shown.tp + one.tp;
  const layers = (one: (typeof ranks)[number]) => shown.layers[one.pp]!.map((chunk) => (chunk.length > 1 ? `${chunk[0]}–${chunk.at(-1)}` : `${chunk[0]}`)).join(" + ");
  const experts = (one: (typeof ranks)[number]) => {
    const [first, last] = shown.experts[one.ep] ?? [0, 0];
    return first === last ? `${first}` : `${first}–${last}`;
  };
  const line = figure.timelines[`${shown.pp} ${shown.pp > 1 ? shown.vpp : 1} ${count}`]!;
  return (
    <>
      <Controls>
        <Select label={t(["Model", "模型"])} value={name} options={Object.entries(figure.models).map(([key, [, n]]) => [key, `${key} (${(n / 1e6).toFixed(0)}M)`] as const)} onChange={model} />
        {SIZES.map((size) => (
          <Select key={size} label={size.toUpperCase()} value={shown[size]} options={[...new Set(all.map((one) => one[size]))].sort((a, b) => a - b).map((n) => [n, String(n)] as const)} onChange={choose(size)} />
        ))}
      </Controls>
      <Result>
        {t(["{world} ranks = TP {tp} × PP {pp} × DP {dp}; EP {ep}", "{world} 个进程 = TP {tp} × PP {pp} × DP {dp}；EP {ep}"], { world: figure.world, tp: shown.tp, pp: shown.pp, dp: shown.dp, ep: shown.ep })}
      </Result>
      <div class="ranks" role="group" aria-label={t(["Ranks", "进程"])}>
        {ranks.map((one, i) => (
          <button type="button" key={i} class={`rank expert-${one.pp}`} aria-pressed={i === rank} onClick={() => setRank(i)}>
            <strong>{t(["rank {i}", "进程 {i}"], { i })}</strong>
            <span>TP {one.tp} · PP {one.pp} · DP {one.dp}{shown.ep > 1 ? ` · EP ${one.ep}` : ""}</span>
            <span>{t(["layers {n}", "第 {n} 层"], { n: layers(one) })}</span>
            {shown.experts.length > 0 && <span>{t(["experts {n}", "专家 {n}"], { n: experts(one) })}</span>}
            <span>{whole(shown.parameters[folder(one)]!)}</span>
          </button>
        ))}
      </div>
      <Table
        caption={t(["Tensors of rank {rank}: layers {layers}, {n} parameters", "进程 {rank} 的张量：第 {layers} 层，{n} 个参数"], { rank, layers: layers(mine), n: whole(shown.parameters[folder(mine)]!) })}
        head={[t(["tensor", "张量"]), t(["shape on the rank", "在该进程上的形状"])]}
        rows={Object.entries(shown.shapes).filter(([key]) => (key.startsWith("embedding") ? mine.pp === 0 || mine.pp === shown.pp - 1 : key.startsWith("decoder") ? mine.pp === shown.pp - 1 : true)).map(([key, shape]) => [<code>{key.replace("local_experts.0", `local_experts.${experts(mine)}`)}</code>, shape.join(" × ")])}
      />
      <div class="side-by-side">
        <Bars label={t(["Bytes that the busiest rank sends in a step ({m} micro-batches)", "发送最多的进程每步发送的字节（{m} 个微批次）"], { m: shown.micro_batches })} rows={Object.entries(shown.sent).map(([kind, value]) => ({ name: kind, value, text: bytes(value) }))} />
        <Bars label={t(["Memory of the largest rank", "占用最多的进程的内存"])} rows={Object.entries(shown.memory).map(([kind, value]) => ({ name: kind, value, text: bytes(value) }))} />
      </div>
      <Controls>
        <Select label={t(["Micro-batches of the timeline", "时间线的微批次数"])} value={count} options={[[4, "4"], [8, "8"]]} onChange={setCount} />
      </Controls>
      <PipelineTimeline line={line} stages={shown.pp} count={count} />
    </>
  );
}

function distance(layout: Layout, wanted: Record<Size, number>): number {
  return SIZES.reduce((sum, size) => sum + Math.abs(Math.log2(layout[size]) - Math.log2(wanted[size])), 0);
}

function PipelineTimeline({ line, stages, count }: { line: Timeline; stages: number; count: number }): JSX.Element {
  const unit = 640 / line.end;
  const label = t(["Timeline of {stages} stages and {count} micro-batches: each rank waits {share} % of the step", "{stages} 个阶段、{count} 个微批次的时间线：每个进程有 {share} % 的时间在等待"], { stages, count, share: (100 * line.bubble).toFixed(1) });
  return (
    <figure class="plot">
      <svg viewBox={`0 0 640 ${stages * 30}`} role="img" aria-label={label}>
        {line.ranks.map((passes, rank) =>
          passes.map(([kind, micro, chunk, start]) => (
            <g key={`${rank} ${start}`}>
              <rect class={`pass ${kind ? "backward" : "forward"} chunk-${chunk}`} x={start * unit + 0.5} y={rank * 30 + 2} width={(1 + kind) * unit - 1} height="26" />
              {unit * (1 + kind) > 12 && <text class="on-pass" x={(start + (1 + kind) / 2) * unit} y={rank * 30 + 19} text-anchor="middle">{micro}</text>}
            </g>
          )),
        )}
      </svg>
      <figcaption>
        <span class="legend forward">{t(["forward", "前向"])}</span>
        <span class="legend backward">{t(["backward", "反向"])}</span>
        <span class="axis">{label}</span>
      </figcaption>
    </figure>
  );
}

interface Journey {
  label: string;
  mcore: string;
  hf: string[];
  shapes: number[][];
  shape: number[];
  axis: "rows" | "columns";
  whole: [source: number, first: number, n: number][];
  ranks: [source: number, first: number, n: number][][];
}

interface CheckpointFigure {
  files: [name: string, size: number][];
  parts: Record<string, [folder: string, name: string, shape: number[]][]>;
  journeys: Journey[];
}

/** The files of a checkpoint, and a tensor's way from Hugging Face to the ranks. */
export function CheckpointWidget({ figure }: { figure: CheckpointFigure }): JSX.Element {
  const [which, setWhich] = useState(0);
  const [name, setName] = useState(Object.keys(figure.parts)[1]!);
  const journey = figure.journeys[which]!;
  const last = (text: string) => text.replace(/^(model|decoder)\.layers\.0\./, "");
  const brief = (text: string) => last(text).replace(/^(self_attn|mlp|model)\.|\.weight$/g, "");
  const blocks = (runs: Journey["whole"]) => (
    <div class="blocks">
      {runs.map(([source, first, n], i) => (
        <div key={i} class={`block expert-${source}`}>
          {brief(journey.hf[source]!)} <span>{`${first}:${first + n}`}</span>
        </div>
      ))}
    </div>
  );
  const axis = journey.axis === "rows" ? t(["rows", "行"]) : t(["columns", "列"]);
  return (
    <>
      <Controls one>
        <Select label={t(["Tensor", "张量"])} value={which} options={figure.journeys.map((one, i) => [i, last(one.mcore)] as const)} onChange={setWhich} />
      </Controls>
      <div class="journey">
        <section>
          <h4>Hugging Face</h4>
          <div class="blocks">
            {journey.hf.map((one, source) => (
              <div key={one} class={`block expert-${source}`}>
                {brief(one)} <span>{journey.shapes[source]!.join(" × ")}</span>
              </div>
            ))}
          </div>
        </section>
        <section>
          <h4>{`megatron-core, ${journey.shape.join(" × ")}`}</h4>
          {blocks(journey.whole)}
        </section>
        {journey.ranks.map((runs, rank) => (
          <section key={rank}>
            <h4>{t(["TP rank {rank} of 2", "TP 进程 {rank}（共 2 个）"], { rank })}</h4>
            {blocks(runs)}
          </section>
        ))}
      </div>
      <Result>{t(["The numbers are {axis} of the tensors of Hugging Face.", "数字是 Hugging Face 张量的{axis}号。"], { axis })}</Result>
      <Controls one>
        <Select label={t(["Where is, with TP 2 and PP 2,", "TP 2、PP 2 时，张量在哪里："])} value={name} options={Object.keys(figure.parts).map((one) => [one, one] as const)} onChange={setName} />
      </Controls>
      <Table head={[t(["directory", "目录"]), t(["shape", "形状"]), t(["name in it", "其中的名字"])]} rows={figure.parts[name]!.map(([folder, own, shape]) => [<code>{folder}</code>, shape.join(" × "), <code class="wrapped">{own}</code>])} />
      {figure.files.length > 0 && <Table caption={t(["Files of the quickstart's checkpoint", "快速开始的检查点中的文件"])} head={[t(["file", "文件"]), t(["size", "大小"])]} rows={figure.files.map(([file, size]) => [<code>{file}</code>, bytes(size)])} />}
    </>
  );
}

interface CacheFigure {
  models: Record<string, { layers: number; heads: number; kv_heads: number; head_dim: number; parameters: number; bytes_per_token: number }>;
  difference: number;
}

/** Bytes of keys and values, and what the cache saves. */
export function CacheWidget({ figure }: { figure: CacheFigure }): JSX.Element {
  const [name, setName] = useState("minimind3");
  const [power, setPower] = useState(11);
  const [batch, setBatch] = useState(4);
  const [width, setWidth] = useState(2);
  const model = figure.models[name]!;
  const length = 2 ** power;
  const sequences = 2 ** batch;
  const token = 2 * model.layers * model.kv_heads * model.head_dim * width;
  const rows = [
    [t(["weights", "权重"]), model.parameters * width],
    [t(["cache", "缓存"]), token * length * sequences],
    [t(["cache without GQA", "没有 GQA 时的缓存"]), (token * length * sequences * model.heads) / model.kv_heads],
  ] as const;
  return (
    <>
      <Controls>
        <Select label={t(["Model", "模型"])} value={name} options={Object.keys(figure.models).map((key) => [key, key] as const)} onChange={setName} />
        <Select label="dtype" value={width} options={[[2, "bf16"], [4, "fp32"]]} onChange={setWidth} />
        <Slider label={t(["Tokens of a sequence", "每个序列的词元"])} value={power} min={5} max={15} shown={whole(length)} onChange={setPower} />
        <Slider label={t(["Sequences", "序列数"])} value={batch} min={0} max={10} shown={whole(sequences)} onChange={setBatch} />
      </Controls>
      <Result>
        {t(["2 × {layers} layers × {kv} key-value heads × {dim} × {width} bytes = {token} bytes for each token", "2 × {layers} 层 × {kv} 个键值头 × {dim} × {width} 字节 = 每个词元 {token} 字节"], { layers: model.layers, kv: model.kv_heads, dim: model.head_dim, width, token: whole(token) })}
      </Result>
      <Bars label={t(["Memory", "内存"])} rows={rows.map(([kind, value]) => ({ name: kind, value, text: bytes(value) }))} />
      <Table caption={t(["Positions that the model computes to write {n} tokens", "写出 {n} 个词元时模型要计算的位置数"], { n: whole(length) })} head={[t(["with the cache", "有缓存"]), t(["without", "无缓存"]), t(["ratio", "比值"])]} rows={[[whole(length), whole((length * (length + 1)) / 2), whole((length + 1) / 2)]]} />
    </>
  );
}

type Device = "cpu" | "cuda" | "npu";

interface DevicesFigure {
  parts: ({ part: string } & Record<Device, [name: string, summary: string][]>)[];
}

const PARTS: Record<string, readonly [string, string]> = {
  RMSNorm: ["RMSNorm", "RMSNorm"],
  "rotary embedding": ["rotary embedding", "旋转位置编码"],
  attention: ["attention", "注意力"],
  SwiGLU: ["SwiGLU", "SwiGLU"],
  communication: ["communication", "通信"],
};

/** What runs each part of a training step on a device. */
export function DevicesWidget({ figure }: { figure: DevicesFigure }): JSX.Element {
  const [device, setDevice] = useState<Device>("cpu");
  return (
    <>
      <Controls>
        <Select label={t(["Device", "设备"])} value={device} options={[["cpu", "CPU"], ["cuda", "CUDA"], ["npu", "NPU"]]} onChange={setDevice} />
      </Controls>
      <Table
        head={[t(["part of a layer", "层的部件"]), t(["runs", "由谁执行"])]}
        rows={figure.parts.map((part) => [
          t(PARTS[part.part] ?? [part.part, part.part]),
          part[device].map(([name, summary]) => (
            <div key={name} class="wrapped">
              <code>{name}</code> {summary.replaceAll("`", "")}
            </div>
          )),
        ])}
      />
    </>
  );
}
