import { useEffect, useState } from "preact/hooks";
import { kept, Store, useStore } from "../shared/store";
import { Conversation, type Message, type Settings } from "./conversation";
import { listModels, listTools, normalBase, ServerError, type Model, type Server, type ToolDefinition } from "./server";

export type Side = 0 | 1;
export const LETTERS = ["A", "B"] as const;

// The addresses are in the page's own address, ?api=...&compare=..., so that a bookmark keeps them.
const query = new URLSearchParams(location.search);
export const bases = new Store([query.get("api") ?? "", query.get("compare") ?? ""].map(normalBase));
export const comparing = new Store(query.has("compare"));

function writeAddress(): void {
  const url = new URL(location.href);
  for (const [name, value] of [["api", bases.value[0]], ["compare", bases.value[1]]] as const) {
    if (value || (name === "compare" && comparing.value)) url.searchParams.set(name, value ?? "");
    else url.searchParams.delete(name);
  }
  if (!comparing.value) url.searchParams.delete("compare");
  history.replaceState(null, "", url);
}
bases.subscribe(writeAddress);
comparing.subscribe(writeAddress);

// By address: the key of one server is never sent to another one.
export const keys = kept<Record<string, string>>("minimind.chat.keys", {}, () => sessionStorage);

/** Keep the key of a link, #key=..., which is this server's, and remove it from the address. */
function readKey(): void {
  const key = new URLSearchParams(location.hash.slice(1)).get("key");
  if (key === null) return;
  keys.set({ ...keys.value, "": key });
  history.replaceState(null, "", location.pathname + location.search);
}
readKey();
addEventListener("hashchange", readKey);

// Other servers that the user agreed to. A link can name any server: nothing is sent there before.
const agreed = kept<string[]>("minimind.chat.agreed", []);

function isAgreed(base: string): boolean {
  return !base || base === location.origin || agreed.value.includes(base);
}

/** Set the address of a side's server, as its user wants it. */
export function chooseServer(side: Side, base: string): void {
  if (!isAgreed(base)) agreed.set([...agreed.value, base]);
  bases.set(bases.value.map((old, n) => (n === side ? base : old)));
}

/** What the user has set; `format` "" stands for the model's own. */
export type Parameters = Omit<Settings, "tools" | "plain"> & {
  tools: string[];
  ownTools: string;
  format: "" | "chat" | "plain";
};

export const parameters = kept<Parameters>("minimind.chat.parameters", {
  system: "", temperature: "", topP: "", maxTokens: "", seed: "", thinking: "", tokens: false, tools: [], ownTools: "",
  format: "",
});

/** What is known of the server of a side. */
export interface Connection {
  state: "unasked" | "connecting" | "ready" | "failed"; // unasked: the user has not agreed to the server of a link
  models: Model[];
  error?: unknown;
}

export const connections = [0, 1].map(() => new Store<Connection>({ state: "connecting", models: [] }));
export const chosenModels = new Store(["", ""]);
export const serverTools = new Store<ToolDefinition[]>([]);

function address(base: string): Server {
  return { base, key: keys.value[base] ?? "", model: "" };
}

export function serverOf(side: Side): Server {
  const models = connections[side]!.value.models.map((model) => model.id);
  const chosen = chosenModels.value[side]!;
  return { ...address(bases.value[side]!), model: models.includes(chosen) ? chosen : (models[0] ?? chosen) };
}

/** The user's own definitions; undefined if the text is not a list of definitions. */
export function ownTools(text: string): ToolDefinition[] | undefined {
  if (!text.trim()) return [];
  try {
    const parsed = JSON.parse(text) as ToolDefinition | ToolDefinition[];
    const list = Array.isArray(parsed) ? parsed : [parsed];
    return list.every((tool) => tool?.type === "function" && typeof tool.function?.name === "string") ? list : undefined;
  } catch {
    return undefined;
  }
}

/** Whether a side's model continues texts, and has no chats. */
export function isPlain(side: Side): boolean {
  const { format } = parameters.value;
  if (format) return format === "plain";
  const { model } = serverOf(side);
  return connections[side]!.value.models.find(({ id }) => id === model)?.chat_template === false;
}

export function currentSettings(side: Side): Settings {
  const { tools, ownTools: text, format, ...rest } = parameters.value;
  const own = ownTools(text) ?? [];
  const names = new Set(own.map((tool) => tool.function.name));
  const chosen = serverTools.value.filter(({ function: { name } }) => tools.includes(name) && !names.has(name));
  return { ...rest, tools: [...chosen, ...own], plain: isPlain(side) };
}

// Tools run on the server of this page, also when another server has the model.
function toolRunner() {
  const own = new Set((ownTools(parameters.value.ownTools) ?? []).map((tool) => tool.function.name));
  const names = serverTools.value.map((tool) => tool.function.name).filter((name) => !own.has(name));
  return { server: address(""), names: new Set(names), on: new Set(parameters.value.tools) };
}

export const conversations = ([0, 1] as const).map(
  (side) => new Conversation(() => serverOf(side), () => currentSettings(side), toolRunner),
);

// A reload finds the conversations of its tab, and a new tab the last ones of this browser.
const KEPT = "minimind.chat.conversations";
const STORAGES = [() => sessionStorage, () => localStorage];

function isConversation(value: unknown): value is Message[] {
  const isMessage = (message: Message) =>
    typeof message?.text === "string" &&
    Number.isInteger(message.key) &&
    (message.role === "user" || (message.role === "assistant" && Array.isArray(message.calls)));
  return Array.isArray(value) && value.every(isMessage);
}

function restore(): void {
  for (const storage of STORAGES) {
    try {
      const found = JSON.parse(storage().getItem(KEPT) ?? "null") as unknown;
      if (!Array.isArray(found) || !found.every(isConversation)) continue;
      found.slice(0, 2).forEach((messages, side) => conversations[side]!.restore(messages));
      return;
    } catch {
      // blocked by the browser, or damaged
    }
  }
}

function save(): void {
  const text = JSON.stringify(conversations.map((conversation) => conversation.saved()));
  for (const storage of STORAGES) {
    try {
      storage().setItem(KEPT, text);
    } catch {
      // blocked by the browser, or full
    }
  }
}

restore();
addEventListener("pagehide", save);
for (const conversation of conversations) {
  conversation.busy.subscribe(save);
  conversation.subscribe(() => conversation.busy.value || save()); // not for each part of an answer
}

/** Keep a side's connection up to date; a server that is still loading its model is asked again. */
export function useConnection(side: Side): void {
  const base = useStore(bases)[side]!;
  const key = useStore(keys)[base] ?? "";
  useStore(agreed);
  const mayAsk = isAgreed(base);
  const [attempt, retry] = useState(0);
  useEffect(() => {
    let ended = false;
    const store = connections[side]!;
    let timer: ReturnType<typeof setTimeout> | undefined;
    if (!attempt) store.set({ state: mayAsk ? "connecting" : "unasked", models: [] });
    if (mayAsk) void connect();
    async function connect() {
      try {
        const models = await listModels({ base, key, model: "" });
        if (!ended) store.set({ state: "ready", models });
      } catch (error) {
        if (ended) return;
        store.set({ state: "failed", models: [], error });
        const status = error instanceof ServerError ? error.status : 0;
        if (status === 503) timer = setTimeout(() => retry(attempt + 1), 2000);
      }
    }
    return () => {
      ended = true;
      clearTimeout(timer);
    };
  }, [side, base, key, mayAsk, attempt]);
}

/** Keep the list of the tools that the page's server runs up to date. */
export function useServerTools(): void {
  const key = useStore(keys)[""] ?? "";
  useEffect(() => {
    listTools({ base: "", key, model: "" }).then(
      (tools) => serverTools.set(tools),
      () => serverTools.set([]),
    );
  }, [key]);
}
