import { serverEvents } from "../shared/sse";

/** A server with OpenAI's API. An empty base is the server of this page. */
export interface Server {
  base: string;
  key: string;
  model: string;
}

export interface ToolDefinition {
  type: "function";
  function: { name: string; description?: string; parameters?: unknown };
}

export interface Alternative {
  text: string;
  bytes: number[];
  probability: number;
}

export interface Token extends Alternative {
  id?: number;
  top: Alternative[];
}

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
}

/** What one chunk of a streamed answer adds. */
export interface Delta {
  text: string;
  thinking: string;
  calls: { index: number; id?: string; function?: { name?: string; arguments?: string } }[];
  tokens: Token[];
  finish?: string;
  usage?: Usage;
}

/** The server refused a request, or did not answer (status 0). */
export class ServerError extends Error {
  constructor(
    message: string,
    readonly status: number,
  ) {
    super(message);
  }
}

/** The base address without a trailing "/v1". */
export function normalBase(base: string): string {
  const text = base.trim().replace(/\/+$/, "").replace(/\/v1$/, "");
  return text && !/^https?:\/\//i.test(text) ? `http://${text}` : text;
}

async function send(server: Server, path: string, body?: unknown, signal?: AbortSignal): Promise<Response> {
  const headers: Record<string, string> = {};
  if (server.key) headers.Authorization = `Bearer ${server.key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const url = server.base ? `${server.base}/${path}` : new URL(path, document.baseURI).href;
  let response: Response;
  try {
    response = await fetch(url, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ServerError(String(error), 0);
  }
  if (response.ok) return response;
  const text = await response.text();
  let message = text.slice(0, 500);
  try {
    const { error } = JSON.parse(text) as { error?: { message?: string } };
    message = error?.message ?? message;
  } catch {
    // not JSON: a proxy's page
  }
  throw new ServerError(message || response.statusText, response.status);
}

async function json<T>(server: Server, path: string, body?: unknown, signal?: AbortSignal): Promise<T> {
  return (await (await send(server, path, body, signal)).json()) as T;
}

/** A model of a server. `chat_template` is false for one that only continues texts; vLLM does not say. */
export interface Model {
  id: string;
  chat_template?: boolean;
}

export async function listModels(server: Server): Promise<Model[]> {
  return (await json<{ data: Model[] }>(server, "v1/models")).data;
}

export async function listTools(server: Server): Promise<ToolDefinition[]> {
  return (await json<{ tools: ToolDefinition[] }>(server, "tools")).tools;
}

export async function callTool(
  server: Server,
  name: string,
  argumentsOfCall: unknown,
  signal: AbortSignal,
): Promise<{ text: string; ok: boolean }> {
  return json(server, "tools/call", { name, arguments: argumentsOfCall }, signal);
}

/** The tokens of the prompt that a chat or a text becomes. */
export async function tokenize(server: Server, body: Record<string, unknown>): Promise<Token[]> {
  const whole = { ...body, return_token_strs: true, ...("messages" in body ? { add_generation_prompt: true } : {}) };
  const found = await json<{ tokens: number[]; token_strs?: string[] | null }>(server, "tokenize", whole);
  return found.tokens.map((id, n) => ({ id, text: found.token_strs?.[n] ?? "", bytes: [], probability: 1, top: [] }));
}

interface Logprob {
  token: string;
  logprob: number;
  bytes?: number[] | null;
  top_logprobs?: Logprob[];
}

function alternative(entry: Logprob): Alternative {
  return { text: entry.token, bytes: entry.bytes ?? [], probability: Math.exp(entry.logprob) };
}

/** The log-probabilities of a completion. */
interface TextLogprobs {
  tokens: string[];
  token_logprobs: (number | null)[];
  top_logprobs?: (Record<string, number> | null)[] | null;
}

/** The entries of a chat's or of a completion's log-probabilities. */
function entriesOf(logprobs: { content?: Logprob[] | null } | TextLogprobs | null | undefined): Logprob[] {
  if (!logprobs) return [];
  if (!("tokens" in logprobs)) return logprobs.content ?? [];
  return logprobs.tokens.map((token, n) => {
    const top = Object.entries(logprobs.top_logprobs?.[n] ?? {}).sort((a, b) => b[1] - a[1]);
    return {
      token,
      logprob: logprobs.token_logprobs[n] ?? 0,
      top_logprobs: top.map(([text, logprob]) => ({ token: text, logprob })),
    };
  });
}

interface Chunk {
  error?: { message?: string } | string;
  usage?: Usage | null;
  choices?: {
    delta?: {
      content?: string | null;
      reasoning_content?: string | null;
      reasoning?: string | null;
      tool_calls?: Delta["calls"] | null;
    };
    text?: string; // of a completion
    logprobs?: { content?: Logprob[] | null } | TextLogprobs | null;
    token_ids?: number[] | null;
    finish_reason?: string | null;
  }[];
}

/** What the answer to a chat or the continuation of a text is made of, chunk by chunk. */
export async function* streamAnswer(
  server: Server,
  body: Record<string, unknown>,
  signal: AbortSignal,
): AsyncGenerator<Delta> {
  const whole = { ...body, stream: true, stream_options: { include_usage: true } };
  const path = "prompt" in body ? "v1/completions" : "v1/chat/completions";
  const response = await send(server, path, whole, signal);
  if (!response.body) throw new ServerError("the answer has no body", response.status);
  for await (const event of serverEvents(response.body)) {
    if (event.data === "[DONE]") return;
    const chunk = JSON.parse(event.data) as Chunk;
    if (chunk.error) {
      const { error } = chunk;
      throw new ServerError(typeof error === "string" ? error : (error.message ?? "unknown error"), 500);
    }
    const choice = chunk.choices?.[0];
    const entries = entriesOf(choice?.logprobs);
    const ids = choice?.token_ids ?? [];
    yield {
      text: choice?.delta?.content ?? choice?.text ?? "",
      thinking: choice?.delta?.reasoning_content ?? choice?.delta?.reasoning ?? "",
      calls: choice?.delta?.tool_calls ?? [],
      tokens: entries.map((entry, n) => ({
        ...alternative(entry),
        id: ids.length === entries.length ? ids[n] : undefined,
        top: (entry.top_logprobs ?? []).map(alternative),
      })),
      finish: choice?.finish_reason ?? undefined,
      usage: chunk.usage ?? undefined,
    };
  }
}
