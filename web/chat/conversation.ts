import { Store } from "../shared/store";
import { callTool, streamAnswer, type Server, type Token, type ToolDefinition, type Usage } from "./server";

const MAX_ROUNDS = 16; // of tool calls for one question
const REFRESH = 40; // ms between two renderings of a streamed answer
const PLAIN_TOKENS = 128; // of a continuation, unless the user sets a number; OpenAI's 16 are a few words

export interface Call {
  id: string;
  name: string;
  arguments: string;
  state: "writing" | "running" | "waiting" | "done" | "failed";
  result?: string;
}

export interface UserMessage {
  role: "user";
  key: number;
  text: string;
}

export interface AssistantMessage {
  role: "assistant";
  key: number;
  model: string;
  plain: boolean; // the continuation of a text
  text: string;
  thinking: string;
  calls: Call[];
  tokens: Token[];
  state: "writing" | "done" | "stopped" | "failed";
  finish?: string;
  error?: unknown;
  usage?: Usage;
  firstToken?: number; // seconds until the first token
  speed?: number; // tokens per second after the first token
}

export type Message = UserMessage | AssistantMessage;

/** What is sent with each request, apart from the messages. */
export interface Settings {
  system: string;
  temperature: string;
  topP: string;
  maxTokens: string;
  seed: string;
  thinking: "" | "on" | "off";
  tokens: boolean;
  tools: ToolDefinition[];
  plain: boolean; // the model continues the text of the conversation, without a chat template
}

/** The tools that the page's server has, and those that are switched on. The user answers the calls of other tools. */
export interface ToolRunner {
  server: Server;
  names: ReadonlySet<string>;
  on: ReadonlySet<string>;
}

const NUMBERS = [
  ["temperature", "temperature"],
  ["topP", "top_p"],
  ["maxTokens", "max_tokens"],
  ["seed", "seed"],
] as const;

/** The fields of a chat template: messages, tools, thinking. */
export function templateFields(
  messages: readonly Message[],
  settings: Settings,
  model: string,
): Record<string, unknown> {
  const sent: Record<string, unknown>[] = [];
  if (settings.system.trim()) sent.push({ role: "system", content: settings.system });
  for (const message of messages) {
    if (message.role === "user") {
      sent.push({ role: "user", content: message.text });
      continue;
    }
    const answer: Record<string, unknown> = { role: "assistant", content: message.text };
    if (message.thinking) answer.reasoning_content = answer.reasoning = message.thinking;
    if (message.calls.length) {
      answer.tool_calls = message.calls.map((call) => ({
        id: call.id,
        type: "function",
        function: { name: call.name, arguments: call.arguments },
      }));
    }
    sent.push(answer);
    for (const call of message.calls) {
      const content = call.result ?? '{"error": "the user has stopped this call"}';
      sent.push({ role: "tool", tool_call_id: call.id, content });
    }
  }
  const body: Record<string, unknown> = { model, messages: sent };
  if (settings.tools.length) body.tools = settings.tools;
  if (settings.thinking) {
    const on = settings.thinking === "on";
    body.chat_template_kwargs = { open_thinking: on, enable_thinking: on };
  }
  return body;
}

/** What becomes the prompt: the messages of a chat, or the text so far. */
export function promptFields(messages: readonly Message[], settings: Settings, model: string): Record<string, unknown> {
  if (!settings.plain) return templateFields(messages, settings, model);
  return { model, prompt: messages.map((message) => message.text).join("") };
}

function requestBody(messages: readonly Message[], settings: Settings, model: string): Record<string, unknown> {
  const body = promptFields(messages, settings, model);
  if (settings.plain) body.max_tokens = PLAIN_TOKENS;
  for (const [name, field] of NUMBERS) {
    if (settings[name].trim() !== "") body[field] = Number(settings[name]);
  }
  const logprobs = settings.plain ? { logprobs: 5 } : { logprobs: true, top_logprobs: 5 };
  if (settings.tokens) Object.assign(body, logprobs, { return_token_ids: true });
  return body;
}

/** One conversation with one model. */
export class Conversation extends Store<readonly Message[]> {
  readonly busy = new Store(false);
  private abort = new AbortController();
  private waiting = new Map<string, (text: string) => void>();
  private nextKey = 1;
  private timer: ReturnType<typeof setTimeout> | undefined;

  constructor(
    private server: () => Server,
    private settings: () => Settings,
    private runner: () => ToolRunner,
  ) {
    super([]);
  }

  /** The messages as they are kept for a reload: without tokens, which are large. */
  saved(): Message[] {
    return this.value.map((message) => {
      if (message.role === "user") return message;
      const state = message.state === "done" ? "done" : "stopped";
      const calls = message.calls.filter((call) => call.result !== undefined);
      return { ...message, state, calls, tokens: [], error: undefined };
    });
  }

  /** Show messages that were kept. */
  restore(messages: readonly Message[]): void {
    this.nextKey = 1 + Math.max(0, ...messages.map((message) => message.key));
    this.set(messages);
  }

  /** Ask, and answer until the model calls no more tools. */
  async send(text: string): Promise<void> {
    if (this.busy.value) return;
    const asked = this.settings().plain ? text : text.trim(); // a text may go on with a space
    this.set([...this.value, { role: "user", key: this.nextKey++, text: asked }]);
    await this.answer();
  }

  /** Answer the question before a message again. */
  async regenerate(key: number): Promise<void> {
    const at = this.value.findIndex((message) => message.key === key);
    const question = this.value.slice(0, at).findLastIndex((message) => message.role === "user");
    if (this.busy.value || question < 0) return;
    this.set(this.value.slice(0, question + 1));
    await this.answer();
  }

  /** Replace a question, and answer it in place of what followed. */
  async edit(key: number, text: string): Promise<void> {
    const at = this.value.findIndex((message) => message.key === key);
    if (this.busy.value || at < 0) return;
    this.set(this.value.slice(0, at));
    await this.send(text);
  }

  stop(): void {
    this.abort.abort();
  }

  clear(): void {
    this.stop();
    this.set([]);
  }

  /** Give the result of a call that no server runs. */
  giveResult(id: string, text: string): void {
    this.waiting.get(id)?.(text);
  }

  private async answer(): Promise<void> {
    const abort = (this.abort = new AbortController());
    this.busy.set(true);
    try {
      for (let round = 0; round < MAX_ROUNDS; round++) {
        const message = await this.reply(abort.signal);
        if (!message?.calls.length) break;
        await Promise.all(message.calls.map((call) => this.run(message, call, abort.signal)));
        if (abort.signal.aborted) break;
      }
    } finally {
      this.waiting.clear();
      this.busy.set(false);
    }
  }

  /** Stream one answer. Returns it if it is complete. */
  private async reply(signal: AbortSignal): Promise<AssistantMessage | undefined> {
    const server = this.server();
    const settings = this.settings();
    const body = requestBody(this.value, settings, server.model);
    const message: AssistantMessage = {
      role: "assistant", key: this.nextKey++, model: server.model, plain: settings.plain, text: "", thinking: "", calls: [], tokens: [], state: "writing",
    };
    this.set([...this.value, message]);
    const began = performance.now();
    let first = 0;
    let last = 0;
    try {
      for await (const delta of streamAnswer(server, body, signal)) {
        if (delta.text || delta.thinking || delta.calls.length || delta.tokens.length) {
          last = performance.now();
          first ||= last;
        }
        message.text += delta.text;
        message.thinking += delta.thinking;
        message.tokens.push(...delta.tokens);
        for (const part of delta.calls) addCall(message.calls, part);
        message.finish = delta.finish ?? message.finish;
        message.usage = delta.usage ?? message.usage;
        this.refresh(message);
      }
      if (!message.plain) message.text = message.text.trim();
      message.state = "done";
    } catch (error) {
      message.state = signal.aborted ? "stopped" : "failed";
      message.error = error;
      message.calls = []; // arguments may be cut
    }
    if (first) {
      message.firstToken = (first - began) / 1000;
      const count = (message.usage?.completion_tokens ?? 0) - 1;
      if (count > 0 && last > first + 10) message.speed = (1000 * count) / (last - first);
    }
    this.refresh(message, true);
    return message.state === "done" ? message : undefined;
  }

  /** Find the result of a call: from the server, or from the user. */
  private async run(message: AssistantMessage, call: Call, signal: AbortSignal): Promise<void> {
    const { server, names, on } = this.runner();
    if (names.has(call.name) && !on.has(call.name)) {
      // The text of a page or of a file can make a model call a tool that was never offered.
      call.result = '{"error": "this tool is off"}';
      call.state = "failed";
    } else if (!names.has(call.name)) {
      call.state = "waiting";
      this.refresh(message, true);
      const text = await new Promise<string | undefined>((resolve) => {
        this.waiting.set(call.id, resolve);
        signal.addEventListener("abort", () => resolve(undefined));
      });
      call.result = text;
      call.state = text === undefined ? "failed" : "done";
    } else {
      call.state = "running";
      this.refresh(message, true);
      try {
        const found = await callTool(server, call.name, JSON.parse(call.arguments || "{}"), signal);
        call.result = found.text;
        call.state = found.ok ? "done" : "failed";
      } catch (error) {
        call.result = JSON.stringify({ error: signal.aborted ? "the user has stopped this call" : String(error) });
        call.state = "failed";
      }
    }
    this.refresh(message, true);
  }

  /** Show the present state of a message. */
  private refresh(message: AssistantMessage, now = false): void {
    const show = () => {
      clearTimeout(this.timer);
      this.timer = undefined;
      const calls = message.calls.map((call) => ({ ...call }));
      this.set(this.value.map((old) => (old.key === message.key ? { ...message, calls } : old)));
    };
    if (now) show();
    else this.timer ??= setTimeout(show, REFRESH);
  }
}

function addCall(calls: Call[], part: { index?: number; id?: string; function?: { name?: string; arguments?: string } }) {
  const index = part.index ?? calls.length;
  const call = (calls[index] ??= { id: "", name: "", arguments: "", state: "writing" });
  call.id ||= part.id ?? `call_${index}`;
  call.name += part.function?.name ?? "";
  call.arguments += part.function?.arguments ?? "";
}
