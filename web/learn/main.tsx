import { render, type JSX } from "preact";
import "./learn.css";
import { AttentionWidget, MoeWidget, NormWidget, RopeWidget } from "./layers";
import { DpoWidget, GrpoWidget, LoraWidget, ScheduleWidget } from "./learning";
import { CacheWidget, CheckpointWidget, DevicesWidget, ParallelWidget } from "./layouts";
import { EmbeddingsWidget, MaskWidget, SamplingWidget, TokenizerWidget } from "./tokens";

// The JSON of a figure is written by minimind_mcore/figures; a test compares its shape with the code.
const WIDGETS: Record<string, (props: { figure: any }) => JSX.Element> = {
  attention: AttentionWidget,
  cache: CacheWidget,
  checkpoint: CheckpointWidget,
  devices: DevicesWidget,
  dpo: DpoWidget,
  embeddings: EmbeddingsWidget,
  grpo: GrpoWidget,
  lora: LoraWidget,
  mask: MaskWidget,
  moe: MoeWidget,
  norm: NormWidget,
  parallel: ParallelWidget,
  rope: RopeWidget,
  sampling: SamplingWidget,
  schedule: ScheduleWidget,
  tokenizer: TokenizerWidget,
};

for (const place of document.querySelectorAll<HTMLElement>(".figure-widget[data-figure]")) {
  const name = place.dataset.figure!;
  const Widget = WIDGETS[name];
  if (!Widget) throw new Error(`there is no widget for figure ${name}`);
  const figure: unknown = JSON.parse(document.getElementById(`figure-${name}`)!.textContent!);
  place.replaceChildren();
  render(<Widget figure={figure} />, place);
}
