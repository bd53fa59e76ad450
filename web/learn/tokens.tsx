import type { JSX } from "preact";
import { useMemo, useState } from "preact/hooks";
import { fromFigure, Tokenizer, unsupported, type PreTokenizer, type TokenizerFile } from "./bpe";
import { Bars, Controls, Result, Select, Slider, Table, Tokens } from "./parts";
import { short, t, visible, whole } from "./text";

interface TokenizerFigure {
  added: string[];
  merges: string[];
  pre_tokenizer: PreTokenizer;
  examples: { text: string; ids: number[] }[];
}

/** Bytes of a piece of which the merges are shown: a piece of n bytes has up to n steps of n symbols. */
const LONGEST = 100;

/** The tokenizer of the page, or one from the reader's disk, on typed text. */
export function TokenizerWidget({ figure }: { figure: TokenizerFigure }): JSX.Element {
  const own = useMemo(() => new Tokenizer(fromFigure(figure)), [figure]);
  const [loaded, setLoaded] = useState<{ name: string; tokenizer: Tokenizer } | null>(null);
  const [problem, setProblem] = useState("");
  const [text, setText] = useState(figure.examples[0]!.text);
  const [chosen, setChosen] = useState(0);
  const tokenizer = loaded?.tokenizer ?? own;
  const tokens = useMemo(() => tokenizer.encode(text), [tokenizer, text]);
  const token = tokens[Math.min(chosen, tokens.length - 1)];
  const long = new TextEncoder().encode(token?.piece ?? "").length > LONGEST;
  const read = async (file: File | undefined) => {
    if (!file) return;
    let content: Partial<TokenizerFile> | null;
    try {
      content = JSON.parse(await file.text()) as Partial<TokenizerFile> | null;
    } catch {
      setProblem(t(["{name} is not a JSON file. Choose a tokenizer.json.", "{name} 不是 JSON 文件。请选择 tokenizer.json。"], { name: file.name }));
      return;
    }
    const missing = !content?.model ? "model" : Array.isArray(content.added_tokens) ? "" : "added_tokens";
    if (missing) {
      setProblem(t(["{name} has no field {missing}. Choose a tokenizer.json.", "{name} 没有字段 {missing}。请选择 tokenizer.json。"], { name: file.name, missing }));
      return;
    }
    const why = unsupported(content as TokenizerFile);
    if (!why) setLoaded({ name: file.name, tokenizer: new Tokenizer(content as TokenizerFile) });
    setProblem(why && t(["{name}: this page does not support {why}. Choose a tokenizer.json of MiniMind.", "{name}：本页不支持 {why}。请选择 MiniMind 的 tokenizer.json。"], { name: file.name, why }));
  };
  const choose = (input: HTMLInputElement) => {
    void read(input.files?.[0]);
    input.value = ""; // so that the same file can be chosen again
  };
  return (
    <>
      <Controls>
        <Select
          label={t(["Example", "示例"])}
          value={figure.examples.findIndex((example) => example.text === text)}
          options={[...figure.examples.map((example, i) => [i, visible(example.text)] as const), [-1, t(["your own text", "自己输入"])]]}
          onChange={(i) => i >= 0 && setText(figure.examples[i]!.text)}
        />
        <div class="control">
          <label for="tokenizer-file">{t(["Another tokenizer.json", "换一个 tokenizer.json"])}</label>
          <input id="tokenizer-file" type="file" accept=".json" onChange={(event) => choose(event.currentTarget)} />
          {loaded && (
            <button type="button" onClick={() => [setLoaded(null), setProblem("")]}>{t(["Back to the page's own tokenizer", "换回本页自己的分词器"])}</button>
          )}
        </div>
      </Controls>
      {problem && <p class="problem" role="alert">{problem}</p>}
      <label class="wide">
        {t(["Text", "文本"])}
        <textarea rows={3} value={text} onInput={(event) => setText(event.currentTarget.value)} />
      </label>
      <Tokens pieces={tokens.map((one) => one.text)} label={t(["Tokens", "词元"])} chosen={chosen} kind={(i) => `shade-${i % 4}`} hint={(i) => String(tokens[i]!.id)} onChoose={setChosen} />
      <Result>
        {t(["{tokens} tokens for {characters} characters ({bytes} bytes), vocabulary of {size}", "{characters} 个字符（{bytes} 字节）切成 {tokens} 个词元，词表大小 {size}"], {
          tokens: tokens.length, characters: [...text].length, bytes: new TextEncoder().encode(text).length,
          size: whole(tokenizer.size),
        })}
        {loaded && ` · ${loaded.name}`}
      </Result>
      <p class="ids" data-ids={tokens.map((one) => one.id).join(" ")}>
        {t(["ids", "编号"])}: {tokens.map((one) => one.id).join(" ")}
      </p>
      {token && (
        <div class="detail">
          <strong>{visible(token.text)}</strong> = {token.id}.{" "}
          {token.piece === null
            ? t(["An added token: it is found before the text is split.", "附加词元：在切分文本之前就被识别。"])
            : long
              ? t(["Its piece of the text has more than {n} bytes. Merges are shown for shorter pieces.", "它所在的这一段文本超过 {n} 字节，只显示较短的段的合并过程。"], { n: LONGEST })
              : t(["The merges of its piece of the text:", "它所在的这一段文本的合并过程："])}
          {token.piece !== null && !long && (
            <ol start={0}>
              {tokenizer.steps(token.piece).map((step, i) => (
                <li key={i}>
                  <Tokens pieces={step} label={t(["after {i} merges", "合并 {i} 次后"], { i })} />
                </li>
              ))}
            </ol>
          )}
        </div>
      )}
    </>
  );
}

interface EmbeddingsFigure {
  tokens: string[];
  ids: number[];
  vectors: number[][];
  points: [number, number][];
  explained: number;
}

function dot(one: readonly number[], other: readonly number[]): number {
  return one.reduce((sum, value, i) => sum + value * other[i]!, 0);
}

/** Side of the square in which the embeddings are drawn. */
const SIDE = 400;

/** Places of labels next to their points, so that no label covers another one. Each goes to the nearest free place. */
export function apart(points: readonly (readonly [x: number, y: number])[], names: readonly string[]): [number, number][] {
  const placed: { x: number; y: number; half: number }[] = [];
  const free = (x: number, y: number, half: number) =>
    x - half >= 0 && x + half <= SIDE && y >= 14 && y <= SIDE - 4 &&
    placed.every((one) => Math.abs(one.x - x) >= one.half + half || Math.abs(one.y - y) >= 14);
  return points.map(([x, y], i) => {
    const half = 1 + 4.3 * names[i]!.length;
    let [labelX, labelY] = [x, y];
    for (let turn = 0; turn < 400 && !free(labelX, labelY, half); turn++) {
      const [radius, angle] = [0.25 * turn, 2.4 * turn];
      [labelX, labelY] = [x + radius * Math.cos(angle), y + radius * Math.sin(angle)];
    }
    placed.push({ x: labelX, y: labelY, half });
    return [labelX, labelY];
  });
}

/** Embeddings on a plane, and the tokens that are nearest to one. */
export function EmbeddingsWidget({ figure }: { figure: EmbeddingsFigure }): JSX.Element {
  const [chosen, setChosen] = useState(3);
  const cosine = (a: number, b: number) => {
    const [x, y] = [figure.vectors[a]!, figure.vectors[b]!];
    return dot(x, y) / Math.sqrt(dot(x, x) * dot(y, y));
  };
  const near = figure.tokens
    .map((name, i) => ({ name, i, value: cosine(chosen, i) }))
    .filter((row) => row.i !== chosen)
    .sort((a, b) => b.value - a.value)
    .slice(0, 10);
  const place = (axis: 0 | 1, value: number) => {
    const all = figure.points.map((point) => point[axis]);
    const [least, most] = [Math.min(...all), Math.max(...all)];
    return 25 + ((value - least) / (most - least)) * (SIDE - 50);
  };
  const points = figure.points.map(([x, y]) => [place(0, x), SIDE - place(1, y)] as const);
  const labels = apart(points, figure.tokens.map(visible));
  const kind = (name: string) => (/^\d$/.test(name) ? "series-0" : /^[A-Z]$/.test(name) ? "series-1" : "series-2");
  return (
    <>
      <Controls>
        <Select label={t(["Token", "词元"])} value={chosen} options={figure.tokens.map((name, i) => [i, visible(name)] as const)} onChange={setChosen} />
      </Controls>
      <div class="side-by-side">
        <figure class="plot">
          <svg viewBox={`0 0 ${SIDE} ${SIDE}`} role="img" aria-label={t(["Embeddings of {n} tokens on their first two principal components", "{n} 个词元的嵌入在前两个主成分上的位置"], { n: figure.tokens.length })}>
            {labels.map(([x, y], i) => (
              <g key={i} class={kind(figure.tokens[i]!)}>
                {Math.hypot(x - points[i]![0], y - points[i]![1]) > 9 && <line class="lead" x1={points[i]![0]} y1={points[i]![1]} x2={x} y2={y - 4} />}
                <text class={`point ${i === chosen ? "chosen" : ""}`} x={x} y={y} text-anchor="middle" onClick={() => setChosen(i)}>
                  {visible(figure.tokens[i]!)}
                </text>
              </g>
            ))}
          </svg>
          <figcaption>
            <span class="legend series-0">{t(["digits", "数字"])}</span>
            <span class="legend series-1">{t(["letters", "字母"])}</span>
            <span class="legend series-2">{t(["others", "其他"])}</span>
            {t(["The plane keeps {share} % of the variance.", "这个平面保留了 {share} % 的方差。"], { share: Math.round(figure.explained * 100) })}
          </figcaption>
        </figure>
        <Bars label={t(["Cosine with {token}", "与 {token} 的余弦"], { token: visible(figure.tokens[chosen]!) })} most={1} rows={near.map((row) => ({ name: visible(row.name), value: row.value, text: row.value.toFixed(3) }))} />
      </div>
    </>
  );
}

interface MaskFigure {
  pieces: string[];
  ids: number[];
  learned: Record<"all" | "last", number[]>;
  losses: number[];
}

/** A conversation, its labels, and the loss of each token. */
export function MaskWidget({ figure }: { figure: MaskFigure }): JSX.Element {
  const [which, setWhich] = useState<"all" | "last" | "none">("all");
  const [chosen, setChosen] = useState(21);
  const learned = which === "none" ? figure.pieces.map((_, i) => Number(i > 0)) : figure.learned[which];
  const counted = learned.reduce((sum, one) => sum + one, 0);
  const loss = figure.losses.reduce((sum, one, i) => sum + one * learned[i]!, 0) / counted;
  return (
    <>
      <Controls>
        <Select
          label={t(["Loss on", "计算损失的部分"])}
          value={which}
          options={[["all", t(["all answers (MiniMind)", "所有回答（MiniMind）"])], ["last", t(["the last answer", "最后一个回答"])], ["none", t(["every token (pretraining)", "每个词元（预训练）"])]]}
          onChange={setWhich}
        />
      </Controls>
      <Tokens pieces={figure.pieces} label={t(["Tokens", "词元"])} chosen={chosen} kind={(i) => (learned[i] ? "learned" : "ignored")} onChoose={setChosen} />
      <Result>
        {t(["{n} of {all} tokens are labels. Their mean loss is {loss}.", "{all} 个词元中有 {n} 个是标签，平均损失为 {loss}。"], { n: counted, all: figure.pieces.length, loss: loss.toFixed(3) })}
      </Result>
      <p class="detail">
        {t(["Token {i}: id {id}, label {label}, loss {loss}", "第 {i} 个词元：编号 {id}，标签 {label}，损失 {loss}"], {
          i: chosen, id: figure.ids[chosen]!, label: learned[chosen] ? figure.ids[chosen]! : -100, loss: figure.losses[chosen]!,
        })}
      </p>
    </>
  );
}

interface SamplingFigure {
  prompts: { name: string; model: string; prompt: string; tokens: string[]; first: number; drops: number[] }[];
}

/** Probabilities from logits in descending order, by the rules of inference/sampling.py. */
export function probabilities(logits: readonly number[], temperature: number, topK: number, topP: number): number[] {
  if (temperature === 0) return logits.map((_, i) => Number(i === 0));
  const powers = logits.map((logit, i) => (topK && i >= topK ? 0 : Math.exp((logit - logits[0]!) / temperature)));
  const total = powers.reduce((sum, one) => sum + one, 0);
  let before = 0;
  const kept = powers.map((power) => {
    const share = power / total;
    const keeps = before < topP;
    before += share;
    return keeps ? share : 0;
  });
  const rest = kept.reduce((sum, one) => sum + one, 0);
  return kept.map((share) => share / rest);
}

/** Temperature, top-k and top-p on the logits of a real prompt. */
export function SamplingWidget({ figure }: { figure: SamplingFigure }): JSX.Element {
  const [which, setWhich] = useState(2);
  const [temperature, setTemperature] = useState(1);
  const [topK, setTopK] = useState(0);
  const [topP, setTopP] = useState(1);
  const [drawn, setDrawn] = useState<Map<number, number>>(new Map());
  const prompt = figure.prompts[which]!;
  const logits = useMemo(() => {
    let value = prompt.first / 100;
    return [value, ...prompt.drops.map((drop) => (value -= drop / 100))];
  }, [prompt]);
  const shares = useMemo(() => probabilities(logits, temperature, topK, topP), [logits, temperature, topK, topP]);
  const kept = shares.filter((share) => share > 0).length;
  const entropy = shares.reduce((sum, share) => sum - (share > 0 ? share * Math.log2(share) : 0), 0);
  const draw = () => {
    const found = new Map<number, number>();
    for (let i = 0; i < 100; i++) {
      let point = Math.random();
      const token = Math.max(shares.findIndex((share) => (point -= share) < 0), 0);
      const place = Math.min(token, prompt.tokens.length); // tokens beyond the named ones count as one
      found.set(place, (found.get(place) ?? 0) + 1);
    }
    setDrawn(found);
  };
  const change = <T,>(set: (value: T) => void) => (value: T) => {
    set(value);
    setDrawn(new Map());
  };
  return (
    <>
      <Controls>
        <Select label={t(["Prompt", "提示"])} value={which} options={figure.prompts.map((one, i) => [i, visible(one.prompt).slice(-36)] as const)} onChange={change(setWhich)} />
        <Slider label={t(["Temperature", "温度"])} value={temperature} min={0} max={3} step={0.05} onChange={change(setTemperature)} />
        <Slider label="top-k" value={topK} min={0} max={40} shown={topK ? String(topK) : t(["off", "关"])} onChange={change(setTopK)} />
        <Slider label="top-p" value={topP} min={0.05} max={1} step={0.05} onChange={change(setTopP)} />
      </Controls>
      <Result>
        {t(["{kept} of {all} tokens can be drawn. Entropy {entropy} bits.", "{all} 个词元中有 {kept} 个可能被抽到。熵为 {entropy} 比特。"], { kept: whole(kept), all: whole(shares.length), entropy: entropy.toFixed(2) })}
      </Result>
      <Bars label={t(["Probability of the next token", "下一个词元的概率"])} most={1} rows={prompt.tokens.slice(0, 14).map((name, i) => ({ name: visible(name), value: shares[i]!, text: `${(100 * shares[i]!).toFixed(1)} %`, faint: shares[i] === 0 }))} />
      <p>
        <button type="button" onClick={draw}>{t(["Draw 100 tokens", "抽取 100 个词元"])}</button>{" "}
        {[...drawn].sort(([, a], [, b]) => b - a).slice(0, 12).map(([place, n]) => `${visible(prompt.tokens[place] ?? "…")} × ${n}`).join(",  ")}
      </p>
      <Table head={[t(["rank", "名次"]), t(["token", "词元"]), "logit"]} rows={prompt.tokens.slice(0, 5).map((name, i) => [i + 1, <code>{visible(name)}</code>, short(logits[i]!, 4)])} />
    </>
  );
}
