import { serverEvents } from "../shared/sse";
import { kept, Store } from "../shared/store";

export type State = "queued" | "running" | "stopping" | "finished" | "stopped" | "failed";
export const ENDED: readonly State[] = ["finished", "stopped", "failed"];

export interface JobRequest {
  stage: string;
  name: string;
  model: string;
  recipe: string;
  data: string;
  tokenizer: string;
  weights: string;
  lora: string;
  teacher: string;
  reward_model: string;
  settings: Record<string, string | number | boolean>;
  device: string;
  devices: number[];
}

export interface Job {
  id: string;
  name: string;
  stage: string;
  state: State;
  request: JobRequest;
  device: string;
  devices: number[];
  created: number;
  started: number;
  ended: number;
  status: number | null;
  error: string;
  attempt: number;
  address: string;
  api_key: string;
  ready: boolean;
  waits_for: string[];
  version: number;
}

export type Row = { iteration: number } & Record<string, number>;
export type Sample = { iteration: number; prompt: string; response: string; reward: string; label: string };

export interface Option {
  name: string;
  kind: "int" | "float" | "choice" | "flag";
  group: "main" | "layout" | "output" | "more";
  default: string;
  choices: string[];
  help: string;
  limits: string;
}

export interface Form {
  stage: string;
  inputs: Record<string, boolean>;
  options: Option[];
}

export interface Plan {
  commands: string[];
  device: string;
  devices: number[];
  facts: Record<string, string>;
  output: string;
  error: string;
}

export interface Info {
  version: string;
  device: string;
  devices: number[];
  presets: string[];
  recipes: string[];
  stages: Record<string, { inputs: Record<string, boolean> }>;
  readable: string[];
}

export interface Device {
  kind: string;
  number: number;
  name: string;
  health: string;
  used: number;
  total: number;
  power: string;
  temperature: string;
  load: number | null;
  usable: boolean;
  jobs: string[];
}

export interface FileEntry {
  name: string;
  path: string;
  size_mb: number;
}

/** The token: of the address, kept for this tab. */
export const token = kept<string>("minimind.manager.token", "", () => sessionStorage);

/** Whether the manager has refused the last token. */
export const refused = new Store(false);

/** Take the token out of the address, where others could read it over a shoulder. */
export function takeToken(): void {
  const given = /^#token=(.+)$/.exec(location.hash)?.[1];
  if (given === undefined) return;
  token.set(decodeURIComponent(given));
  history.replaceState(null, "", `${location.pathname}#/`);
}

/** A reply of the manager that is not a success. */
export class ApiError extends Error {
  constructor(
    message: string,
    readonly status: number,
    readonly body: unknown = undefined,
  ) {
    super(message);
  }
}

async function request(method: string, path: string, body?: unknown, init: RequestInit = {}): Promise<Response> {
  const headers = new Headers(init.headers);
  headers.set("Authorization", `Bearer ${token.value}`);
  if (body !== undefined) headers.set("Content-Type", "application/json");
  const text = body === undefined ? undefined : JSON.stringify(body);
  const reply = await fetch(path, { ...init, method, headers, ...(text === undefined ? {} : { body: text }) });
  if (reply.ok) return reply;
  const content = (await reply.json().catch(() => ({}))) as { error?: string };
  if (reply.status === 401) {
    if (token.value) refused.set(true); // not for a second request with the same token
    token.set("");
  }
  throw new ApiError(content.error ?? `HTTP ${reply.status}`, reply.status, content);
}

export async function get<T>(path: string): Promise<T> {
  return (await (await request("GET", path)).json()) as T;
}

export async function post<T>(path: string, body?: unknown): Promise<T> {
  return (await (await request("POST", path, body ?? {})).json()) as T;
}

/** Delete what an address stands for. */
export async function remove(path: string): Promise<void> {
  await request("DELETE", path);
}

/** What a page knows of a job from its events. */
export interface Live {
  job: Job | undefined;
  rows: Row[];
  lines: string[];
  error: string; // why there are no events, for example because the job does not exist
}

const MOST_LINES = 5000;
const MOST_ROWS = 20000;

/** Wait until the page is visible. */
function visible(): Promise<void> {
  return new Promise((resolve) => {
    const check = () => {
      if (document.hidden) return;
      document.removeEventListener("visibilitychange", check);
      resolve();
    };
    document.addEventListener("visibilitychange", check);
    check();
  });
}

/**
 * Follow a job until `signal` is aborted. The stream ends with the job, while the page is hidden, or with a lost
 * connection: a browser opens at most six to a server. The next one goes on behind the last event.
 */
export async function follow(id: string, signal: AbortSignal, changed: (live: Live) => void): Promise<void> {
  let live: Live = { job: undefined, rows: [], lines: [], error: "" };
  let last = "";
  while (!signal.aborted) {
    await visible();
    const ending = new AbortController();
    const end = () => (signal.aborted || document.hidden) && ending.abort();
    document.addEventListener("visibilitychange", end);
    signal.addEventListener("abort", end);
    try {
      const headers: Record<string, string> = last ? { "Last-Event-ID": last } : {};
      const reply = await request("GET", `/api/jobs/${id}/events?tail=1000`, undefined, {
        headers,
        signal: ending.signal,
      });
      for await (const event of serverEvents(reply.body!)) {
        last = event.id || last;
        live = taken(live, event.event, JSON.parse(event.data));
        changed(live);
      }
    } catch (error) {
      if (error instanceof ApiError && error.status < 500) return changed({ ...live, error: error.message });
    } finally {
      document.removeEventListener("visibilitychange", end);
      signal.removeEventListener("abort", end);
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

/** Rows without every second one of the older half, if they are too many for a page. */
function thinned(rows: Row[]): Row[] {
  return rows.length > MOST_ROWS ? rows.filter((_, number) => number % 2 === 0 || number > MOST_ROWS / 2) : rows;
}

function taken(live: Live, kind: string, data: unknown): Live {
  if (kind === "state") return { ...live, job: data as Job };
  if (kind === "reset") return { ...live, rows: [] };
  if (kind === "metrics") return { ...live, rows: thinned([...live.rows, ...(data as { rows: Row[] }).rows]) };
  if (kind === "log") return { ...live, lines: [...live.lines, ...(data as { lines: string[] }).lines].slice(-MOST_LINES) };
  return live;
}
