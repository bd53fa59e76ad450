import type { JSX } from "preact";
import { useState } from "preact/hooks";
import { Bars, Controls, Lines, Result, Select, Slider, Table } from "./parts";
import { short, t, visible, whole } from "./text";

type Style = "cosine" | "linear" | "constant" | "WSD";

interface ScheduleFigure {
  lr: number;
  min_lr: number;
  warmup: number;
  iterations: number;
  decay: number;
  every: number;
  rates: Record<Style, number[]>;
}

/** The learning rate of Megatron's schedule at an iteration. */
function rate(style: Style, i: number, lr: number, least: number, warmup: number, iterations: number, decay: number): number {
  if (warmup && i <= warmup) return (lr * i) / warmup;
  if (style === "constant") return lr;
  if (i > iterations) return least;
  if (style === "WSD") {
    const begin = iterations - decay;
    return i <= begin ? lr : lr - (lr - least) * ((i - begin) / decay);
  }
  const share = (i - warmup) / (iterations - warmup);
  return least + (lr - least) * (style === "linear" ? 1 - share : 0.5 * (1 + Math.cos(Math.PI * share)));
}

/** The learning-rate schedule; dots are megatron-core's own values for the first settings. */
export function ScheduleWidget({ figure }: { figure: ScheduleFigure }): JSX.Element {
  const [style, setStyle] = useState<Style>("cosine");
  const [warmup, setWarmup] = useState(figure.warmup);
  const [lr, setLr] = useState(figure.lr);
  const [share, setShare] = useState(Number((figure.min_lr / figure.lr).toFixed(4)));
  const same = warmup === figure.warmup && lr === figure.lr && share === Number((figure.min_lr / figure.lr).toFixed(4));
  const places = Array.from({ length: 201 }, (_, i) => (i * figure.iterations) / 200);
  const values = places.map((i) => [i, rate(style, i, lr, lr * share, warmup, figure.iterations, figure.decay)] as const);
  const recorded = figure.rates[style].map((value, i) => [i * figure.every, value] as const);
  const worst = Math.max(...recorded.map(([i, value]) => Math.abs(value - rate(style, i, lr, lr * share, warmup, figure.iterations, figure.decay))));
  return (
    <>
      <Controls>
        <Select label="--lr-decay-style" value={style} options={(Object.keys(figure.rates) as Style[]).map((name) => [name, name] as const)} onChange={setStyle} />
        <Slider label="--lr" value={lr} min={0.0005} max={0.006} step={0.0005} onChange={setLr} />
        <Slider label="--lr-warmup-iters" value={warmup} min={0} max={300} step={10} onChange={setWarmup} />
        <Slider label="--min-lr / --lr" value={share} min={0} max={0.5} step={0.05} onChange={setShare} />
      </Controls>
      <Lines label={t(["Learning rate by iteration, style {style}", "学习率随迭代的变化，方式 {style}"], { style })} x={t(["iteration", "迭代"])} least={0} lines={[{ name: t(["formula", "公式"]), points: values }, ...(same ? [{ name: "megatron-core", points: recorded, dots: true }] : [])]} />
      <Result>
        {same
          ? t(["Largest difference between the formula and megatron-core: {worst}", "公式与 megatron-core 的最大差：{worst}"], { worst: short(worst, 2) })
          : t(["At iteration {i}: {value}", "第 {i} 次迭代：{value}"], { i: figure.iterations / 2, value: short(rate(style, figure.iterations / 2, lr, lr * share, warmup, figure.iterations, figure.decay), 4) })}
      </Result>
    </>
  );
}

interface LoraFigure {
  ranks: number[];
  models: Record<string, { all: number; adapters: number[] }>;
  changes: { name: string; values: number[] }[];
}

/** How many parameters adapters have, and how much of a real change a rank can hold. */
export function LoraWidget({ figure }: { figure: LoraFigure }): JSX.Element {
  const [place, setPlace] = useState(3);
  const [matrix, setMatrix] = useState(0);
  const rank = figure.ranks[place]!;
  const change = figure.changes[matrix]!;
  const squares = change.values.map((value) => value * value);
  const total = squares.reduce((a, b) => a + b, 0);
  let sum = 0;
  const kept = squares.map((value, i) => [i + 1, (sum += value) / total] as const);
  return (
    <>
      <Controls>
        <Slider label={t(["Rank r", "秩 r"])} value={place} min={0} max={figure.ranks.length - 1} shown={String(rank)} onChange={setPlace} />
        <Select label={t(["Matrix", "矩阵"])} value={matrix} options={figure.changes.map((one, i) => [i, one.name.replace(".weight", "")] as const)} onChange={setMatrix} />
      </Controls>
      <Table head={[t(["model", "模型"]), t(["all parameters", "全部参数"]), t(["of adapters", "适配器的参数"]), t(["share", "比例"])]} rows={Object.entries(figure.models).map(([name, one]) => [<code>{name}</code>, whole(one.all), whole(one.adapters[place]!), `${short((100 * one.adapters[place]!) / one.all)} %`])} />
      <Lines label={t(["Share of the squared change in {name} that the best matrix of rank r holds", "{name} 的改变量（平方和）中，最佳秩 r 矩阵能表示的比例"], { name: change.name })} x="r" least={0} lines={[{ name: t(["share of ‖ΔW‖²", "‖ΔW‖² 的比例"]), points: kept }]} mark={[rank, kept[rank - 1]![1]]} />
      <Result>
        {t(["Rank {rank} can hold {share} % of what full fine-tuning changed in this matrix.", "秩 {rank} 最多能表示全量微调在这个矩阵上改变量的 {share} %。"], { rank, share: (100 * kept[rank - 1]![1]).toFixed(1) })}
      </Result>
    </>
  );
}

interface DpoFigure {
  prompt: string;
  chosen: string;
  rejected: string;
  beta: number;
  steps: { chosen: number; rejected: number; loss: number }[];
}

const dpoLoss = (beta: number, margin: number) => Math.log1p(Math.exp(-beta * margin));

/** DPO on one pair: the margin over the updates, and the loss for any beta. */
export function DpoWidget({ figure }: { figure: DpoFigure }): JSX.Element {
  const [step, setStep] = useState(0);
  const [beta, setBeta] = useState(figure.beta);
  const [first, now] = [figure.steps[0]!, figure.steps[step]!];
  const gained = [now.chosen - first.chosen, now.rejected - first.rejected] as const;
  const margin = gained[0] - gained[1];
  const margins = Array.from({ length: 81 }, (_, i) => -10 + i / 4);
  return (
    <>
      <Controls>
        <Slider label={t(["Updates", "更新次数"])} value={step} min={0} max={figure.steps.length - 1} onChange={setStep} />
        <Slider label="β" value={beta} min={0.05} max={1} step={0.05} onChange={setBeta} />
      </Controls>
      <Table head={[figure.prompt, "log p", "log p_ref", t(["gain", "增量"])]} rows={([["chosen", figure.chosen, now.chosen, first.chosen, gained[0]], ["rejected", figure.rejected, now.rejected, first.rejected, gained[1]]] as const).map(([kind, answer, a, b, gain]) => [`${kind}: ${answer}`, a.toFixed(4), b.toFixed(4), gain.toFixed(4)])} />
      <Result>
        {t(["m = {margin}; loss = −log σ({beta} × m) = {loss}. The gradient is weighted by β σ(−β m) = {weight}.", "m = {margin}；损失 = −log σ({beta} × m) = {loss}。梯度的权重是 β σ(−β m) = {weight}。"], {
          margin: margin.toFixed(4), beta, loss: dpoLoss(beta, margin).toFixed(5), weight: short(beta / (1 + Math.exp(beta * margin))),
        })}
      </Result>
      <div class="side-by-side">
        <Lines label={t(["Loss by margin, for this β", "该 β 下损失随 m 的变化"])} x="m" lines={[{ name: `−log σ(${beta} m)`, points: margins.map((m) => [m, dpoLoss(beta, m)] as const) }]} mark={[margin, dpoLoss(beta, margin)]} />
        <Lines label={t(["Log-probabilities of both answers over the updates", "两个回答的对数概率随更新的变化"])} x={t(["update", "更新"])} lines={[{ name: "chosen", points: figure.steps.map((one, i) => [i, one.chosen] as const) }, { name: "rejected", points: figure.steps.map((one, i) => [i, one.rejected] as const) }]} />
      </div>
    </>
  );
}

interface GrpoFigure {
  prompt: string;
  answer: string;
  clip: number;
  responses: string[][];
  rewards: number[];
  advantages: number[];
  updates: { ratios: number[][]; loss: number; clipped: number }[];
}

/** A group, its advantages, and what the clipping does to each token after some updates. */
export function GrpoWidget({ figure }: { figure: GrpoFigure }): JSX.Element {
  const [step, setStep] = useState(0);
  const [clip, setClip] = useState(figure.clip);
  const [spread, setSpread] = useState<"std" | "none">("std");
  const mean = figure.rewards.reduce((a, b) => a + b, 0) / figure.rewards.length;
  const deviation = Math.sqrt(figure.rewards.reduce((sum, reward) => sum + (reward - mean) ** 2, 0) / (figure.rewards.length - 1));
  const advantages = figure.rewards.map((reward) => (reward - mean) / (spread === "std" ? deviation + 1e-6 : 1));
  const ratios = figure.updates[step]!.ratios;
  const cut = (ratio: number, advantage: number) => (advantage > 0 && ratio > 1 + clip) || (advantage < 0 && ratio < 1 - clip);
  const losses = ratios.flatMap((row, i) => row.map((ratio) => {
    const bounded = Math.min(Math.max(ratio, 1 - clip), 1 + clip);
    return Math.max(-advantages[i]! * ratio, -advantages[i]! * bounded);
  }));
  const loss = losses.reduce((a, b) => a + b, 0) / losses.length;
  const clipped = ratios.flatMap((row, i) => row.filter((ratio) => cut(ratio, advantages[i]!))).length / losses.length;
  return (
    <>
      <Controls>
        <Slider label={t(["Updates", "更新次数"])} value={step} min={0} max={figure.updates.length - 1} onChange={setStep} />
        <Slider label="ε" value={clip} min={0.05} max={0.5} step={0.05} onChange={setClip} />
        <Select label={t(["Advantage", "优势"])} value={spread} options={[["std", "(r − mean) / std"], ["none", t(["r − mean (Dr.GRPO)", "r − mean（Dr.GRPO）"])]]} onChange={setSpread} />
      </Controls>
      <p>{t(["Prompt {prompt}. Only the answer {answer} earns a reward.", "提示 {prompt}。只有回答 {answer} 得到奖励。"], { prompt: figure.prompt, answer: figure.answer })}</p>
      <Table
        head={[t(["response", "回答"]), t(["reward", "奖励"]), t(["advantage", "优势"]), t(["ratio of each token", "每个词元的比值"])]}
        rows={figure.responses.map((pieces, i) => [
          <code>{visible(pieces.slice(0, -1).join(""))}</code>, figure.rewards[i], advantages[i]!.toFixed(4),
          ratios[i]!.map((ratio, k) => (
            <span key={k} class={`token-ratio ${cut(ratio, advantages[i]!) ? "clipped" : ""}`} title={visible(pieces[k]!)}>{ratio.toFixed(3)}</span>
          )),
        ])}
      />
      <Result>
        {t(["Mean reward {mean}, standard deviation {std}. Loss {loss}; {share} % of the tokens are clipped and get no gradient.", "平均奖励 {mean}，标准差 {std}。损失 {loss}；{share} % 的词元被截断，没有梯度。"], { mean, std: deviation.toFixed(4), loss: (loss + 0).toFixed(4), share: (100 * clipped).toFixed(0) })}
      </Result>
      <Bars label={t(["Advantages", "优势"])} rows={figure.responses.map((pieces, i) => ({ name: `${i} ${pieces.slice(0, -1).join("")}`, value: advantages[i]!, text: advantages[i]!.toFixed(3) }))} />
    </>
  );
}
