import type { JSX } from "preact";
import { useEffect, useMemo, useState } from "preact/hooks";
import { CopyButton } from "../shared/widgets";
import {
  ApiError, ENDED, follow, get, post, remove, type FileEntry, type Job, type Live, type Plan, type Row, type Sample,
} from "./api"; // prettier-ignore
import { ChartCard } from "./chart";
import { duration, moment, short } from "./format";
import { Log } from "./log";
import { useText, type Key } from "./words";

const NOTHING: Live = { job: undefined, rows: [], lines: [], error: "" };
const REWARD = "grpo/score/mean";
const OUTDATED = ["iteration", "consumed_samples", "consumed_tokens", "global_batch_size", "skipped_iterations"];

/** The metrics that a curve can show, the most telling first. */
export function columns(rows: Row[]): string[] {
  const known = new Set(rows.slice(-50).flatMap((row) => Object.keys(row)));
  const first = ["lm_loss", REWARD, "validation_loss", "eval/accuracy"].filter((name) => known.has(name));
  return [...first, ...[...known].filter((name) => !first.includes(name) && !OUTDATED.includes(name)).sort()];
}

/** The points of a metric. */
export function points(rows: Row[], column: string): [number, number][] {
  return rows.filter((row) => column in row).map((row) => [row.iteration, row[column]!]);
}

/** The page of a job, which follows its events. */
export function JobPage(props: { id: string; changed: () => void }): JSX.Element {
  const t = useText();
  const [live, setLive] = useState<Live>(NOTHING);
  useEffect(() => {
    const ending = new AbortController();
    setLive(NOTHING);
    void follow(props.id, ending.signal, setLive);
    return () => ending.abort();
  }, [props.id]);
  const { job, rows, lines, error } = live;
  useEffect(() => {
    props.changed();
  }, [job?.version]);
  const problem = error && <p class="notice bad">{error}</p>;
  if (!job) return <>{problem || <p class="hint">{props.id}</p>}</>;
  return (
    <article class="job">
      {problem}
      <Head job={job} changed={props.changed} />
      {job.error && <p class="notice bad">{job.error}</p>}
      {job.waits_for.length > 0 && <p class="notice">{t("waitsFor", { jobs: job.waits_for.join(", ") })}</p>}
      <Facts job={job} rows={rows} />
      {job.stage !== "serve" && <Curves rows={rows} />}
      {rows.some((row) => REWARD in row) && <Samples id={job.id} rows={rows.length} />}
      <Log lines={lines} />
      <Settings job={job} />
    </article>
  );
}

export function StateBadge(props: { state: Job["state"] }): JSX.Element {
  const t = useText();
  return <span class={`badge ${props.state}`}>{t(props.state)}</span>;
}

function Head(props: { job: Job; changed: () => void }): JSX.Element {
  const { job } = props;
  const t = useText();
  const [error, setError] = useState("");
  const [busy, setBusy] = useState(false);
  const erase = async () => {
    const { path, size_mb } = (await get<{ folder: FileEntry }>(`/api/jobs/${job.id}`)).folder;
    if (!confirm(t("deleteQuestion", { name: job.name, path, size: size_mb.toFixed(1) }))) return;
    await remove(`/api/jobs/${job.id}`);
    location.hash = "#/";
    props.changed();
  };
  const act = async (what: "stop" | "kill" | "resume" | "chat" | "delete") => {
    if (what === "kill" && !confirm(t("killQuestion"))) return;
    setError("");
    setBusy(true);
    try {
      if (what === "delete") await erase();
      else {
        const found = await post<Job>(`/api/jobs/${job.id}/${what}`);
        if (what === "chat") location.hash = `#/jobs/${found.id}`;
      }
    } catch (problem) {
      setError((problem as ApiError).message);
    }
    setBusy(false);
  };
  const ended = ENDED.includes(job.state);
  const hasWeights = !["serve", "eval", "download", "tokenizer"].includes(job.stage);
  return (
    <header class="job-head">
      <div>
        <h2 tabIndex={-1}>{job.name}</h2>
        <p class="hint">
          <StateBadge state={job.state} /> {job.stage} · {job.device}
          {job.devices.length > 0 && ` ${job.devices.join(", ")}`} · <span class="mono">{job.id}</span>
        </p>
      </div>
      <div class="row">
        {job.address && job.ready && (
          <a class="button primary" href={`${job.address}#key=${job.api_key}`} target="_blank" rel="noreferrer">
            {t("openChat")}
          </a>
        )}
        {job.address && !job.ready && <span class="hint">{t("loading")}</span>}
        {!ended && (
          <button
            class="danger"
            type="button"
            disabled={busy}
            title={t(job.state === "stopping" ? "killHint" : "stopHint")}
            onClick={() => act(job.state === "stopping" ? "kill" : "stop")}
          >
            {t(job.state === "stopping" ? "kill" : "stop")}
          </button>
        )}
        {(job.state === "stopped" || job.state === "failed") && (
          <button type="button" disabled={busy} onClick={() => act("resume")}>
            {t("resume")}
          </button>
        )}
        {hasWeights && (
          <button type="button" disabled={busy} title={t("chatHint")} onClick={() => act("chat")}>
            {t("chat")}
          </button>
        )}
        {ended && (
          <button class="danger" type="button" disabled={busy} onClick={() => act("delete")}>
            {t("delete")}
          </button>
        )}
      </div>
      {error && (
        <p class="notice bad" role="alert">
          {error}
        </p>
      )}
    </header>
  );
}

/** Seconds now, once a second as long as a job runs. */
function useNow(runs: boolean): number {
  const [now, setNow] = useState(Date.now() / 1000);
  useEffect(() => {
    if (!runs) return;
    const timer = setInterval(() => setNow(Date.now() / 1000), 1000);
    return () => clearInterval(timer);
  }, [runs]);
  return now;
}

function Facts(props: { job: Job; rows: Row[] }): JSX.Element {
  const { job, rows } = props;
  const t = useText();
  const runs = job.state === "running" || job.state === "stopping";
  const now = useNow(runs);
  const elapsed = job.started ? (runs ? now : job.ended) - job.started : 0;
  const value = (column: string) => points(rows, column).at(-1)?.[1];
  const eta = runs ? value("eta_seconds") : undefined;
  const facts: [Key, string][] = [
    ["started", moment(job.started)],
    ["elapsed", job.started ? duration(elapsed) : "–"],
  ];
  if (rows.length) {
    facts.push(["iteration", String(rows.at(-1)!.iteration)]);
    facts.push(value(REWARD) === undefined ? ["loss", short(value("lm_loss"))] : ["reward", short(value(REWARD))]);
    const speed = value("tokens_per_second") ?? value("e2e_tps");
    if (speed !== undefined) facts.push(["speed", short(Math.round(speed))]);
  }
  if (eta !== undefined) facts.push(["eta", duration(eta)]);
  if (job.attempt > 1) facts.push(["attempt", String(job.attempt)]);
  const share = job.state === "finished" ? 1 : eta === undefined ? 0 : elapsed / (elapsed + eta);
  return (
    <section class="facts">
      <dl>
        {facts.map(([name, text]) => (
          <div key={name}>
            <dt>{t(name)}</dt>
            <dd>{text}</dd>
          </div>
        ))}
      </dl>
      {(eta !== undefined || job.state === "finished") && (
        <progress aria-label={t("progress")} max={1} value={share} />
      )}
    </section>
  );
}

function Curves(props: { rows: Row[] }): JSX.Element {
  const t = useText();
  const names = columns(props.rows);
  const [chosen, setChosen] = useState("");
  const column = names.includes(chosen) ? chosen : (names[0] ?? "");
  const curves = useMemo(() => {
    const found = [{ label: column, points: points(props.rows, column) }];
    const validation = points(props.rows, "validation_loss");
    if (column === "lm_loss" && validation.length) found.push({ label: "validation_loss", points: validation });
    return found;
  }, [props.rows, column]);
  return <ChartCard label={t("curves")} {...{ names, column, curves }} onChoose={setChosen} />;
}

function Samples(props: { id: string; rows: number }): JSX.Element | null {
  const t = useText();
  const [samples, setSamples] = useState<Sample[]>([]);
  useEffect(() => {
    get<{ samples: Sample[] }>(`/api/jobs/${props.id}/samples`).then(
      (found) => setSamples(found.samples),
      () => undefined,
    );
  }, [props.id, props.rows]);
  if (!samples.length) return null;
  return (
    <section class="card" aria-labelledby="samples-title">
      <div class="card-head">
        <h3 id="samples-title">{t("samples")}</h3>
      </div>
      <div class="scroll" tabIndex={0} role="region" aria-labelledby="samples-title">
        <table>
          <thead>
            <tr>
              <th>{t("iteration")}</th>
              <th>{t("reward")}</th>
              <th>{t("prompt")}</th>
              <th>{t("response")}</th>
            </tr>
          </thead>
          <tbody>
            {samples.slice(0, 12).map((sample, number) => (
              <tr key={number}>
                <td>{sample.iteration}</td>
                <td>{sample.reward}</td>
                <td class="text">{sample.prompt}</td>
                <td class="text">{sample.response}</td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
    </section>
  );
}

function Settings(props: { job: Job }): JSX.Element {
  const t = useText();
  const [commands, setCommands] = useState<string[]>([]);
  const { request } = props.job;
  const show = async (open: boolean) => {
    if (open && !commands.length) setCommands((await get<Pick<Plan, "commands">>(`/api/jobs/${props.job.id}`)).commands);
  };
  const { settings, ...inputs } = request;
  const given = Object.entries({ ...inputs, ...settings }).filter(
    ([name, value]) => name !== "name" && String(value) !== "" && String(value) !== "false",
  );
  return (
    <details class="card" onToggle={(event) => void show(event.currentTarget.open)}>
      <summary>{t("settings")}</summary>
      <dl class="pairs">
        {given.map(([name, value]) => (
          <div key={name}>
            <dt>{name}</dt>
            <dd class="mono">{String(value)}</dd>
          </div>
        ))}
      </dl>
      {commands.length > 0 && (
        <>
          <h4>
            {t("command")} <CopyButton text={() => commands.join("\n")} />
          </h4>
          <pre class="commands">{commands.join("\n")}</pre>
        </>
      )}
    </details>
  );
}
