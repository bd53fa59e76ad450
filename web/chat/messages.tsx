import type { JSX } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { useWords } from "../shared/i18n";
import { Markdown } from "../shared/markdown";
import { CopyButton } from "../shared/widgets";
import { promptFields, type AssistantMessage, type Call, type Conversation, type UserMessage } from "./conversation";
import { explain } from "./connection";
import { tokenize, type Token } from "./server";
import { currentSettings, serverOf, type Side } from "./state";
import { Tokens } from "./tokens";
import { WORDS } from "./words";

/** JSON with line breaks; other text as it is. */
function pretty(text: string): string {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

/** Whether a key press is Enter alone; Enter also ends the input of a Chinese word. */
export function isEnter(event: KeyboardEvent): boolean {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing;
}

export function Question(props: { message: UserMessage; conversation: Conversation; busy: boolean }): JSX.Element {
  const t = useWords(WORDS);
  const { message, conversation } = props;
  const [draft, setDraft] = useState<string | undefined>(undefined);
  const area = useRef<HTMLTextAreaElement>(null);
  const editing = draft !== undefined;
  useEffect(() => area.current?.focus(), [editing]);
  const save = () => {
    if (!draft?.trim()) return;
    setDraft(undefined);
    void conversation.edit(message.key, draft);
  };
  return (
    <li class="message question">
      <h2 class="sr-only">{t("you")}</h2>
      {editing ? (
        <div class="editor">
          <textarea
            ref={area}
            rows={3}
            aria-label={t("editMessage")}
            value={draft}
            onInput={(event) => setDraft(event.currentTarget.value)}
            onKeyDown={(event) => {
              if (isEnter(event)) {
                event.preventDefault();
                save();
              } else if (event.key === "Escape" && !event.isComposing) {
                event.preventDefault(); // it would also stop an answer
                setDraft(undefined);
              }
            }}
          />
          <div class="actions">
            <button type="button" onClick={() => setDraft(undefined)}>{t("cancel")}</button>
            <button type="button" class="primary" disabled={!draft.trim()} onClick={save}>{t("save")}</button>
          </div>
        </div>
      ) : (
        <>
          <div class="bubble">{message.text}</div>
          <div class="actions">
            <CopyButton text={() => message.text} />
            <button type="button" class="quiet" disabled={props.busy} onClick={() => setDraft(message.text)}>
              {t("edit")}
            </button>
          </div>
        </>
      )}
    </li>
  );
}

export function Answer(props: {
  message: AssistantMessage;
  conversation: Conversation;
  side: Side;
  busy: boolean;
}): JSX.Element {
  const t = useWords(WORDS);
  const { message, conversation } = props;
  const writing = message.state === "writing";
  const thinking = writing && !message.text && !message.calls.length;
  return (
    <li class="message answer" aria-busy={writing}>
      <h2 class="author">{message.model}</h2>
      {message.thinking && (
        // Another key: the fold opens while the model thinks and closes when it answers, unless the user changes it.
        <details key={String(thinking)} class="thinking" open={thinking}>
          <summary>{t(thinking ? "thinkingNow" : "thought")}</summary>
          <Markdown text={message.thinking} />
        </details>
      )}
      {message.text && (message.plain ? <div class="plain">{message.text}</div> : <Markdown text={message.text} />)}
      {writing && !message.text && !message.thinking && !message.calls.length && (
        <p class="dots" role="img" aria-label={t("writing")}><span /><span /><span /></p>
      )}
      {message.calls.map((call) => <CallCard key={call.id} call={call} conversation={conversation} />)}
      {message.state === "failed" && <p class="notice bad" role="alert">{explain(message.error, serverOf(props.side).base, t)}</p>}
      {message.state === "stopped" && <p class="note">{t("stopped")}</p>}
      {message.finish === "length" && <p class="note">{t("atLimit")}</p>}
      {!writing && (
        <div class="actions">
          <CopyButton text={() => message.text} />
          <button type="button" class="quiet" disabled={props.busy} onClick={() => void conversation.regenerate(message.key)}>
            {t("regenerate")}
          </button>
          <Statistics message={message} />
        </div>
      )}
      {message.tokens.length > 0 && !writing && (
        <details class="fold">
          <summary>{t("tokens")} ({message.tokens.length})</summary>
          <Tokens tokens={message.tokens} label={t("tokens")} />
        </details>
      )}
      {message.tokens.length > 0 && !writing && <PromptTokens {...props} />}
    </li>
  );
}

function Statistics({ message }: { message: AssistantMessage }): JSX.Element {
  const t = useWords(WORDS);
  const parts: string[] = [];
  if (message.usage) {
    const { prompt_tokens: prompt, completion_tokens: answer } = message.usage;
    parts.push(t("counts", { prompt, answer }));
  }
  if (message.speed) parts.push(t("speed", { speed: message.speed.toFixed(message.speed < 100 ? 1 : 0) }));
  if (message.firstToken) parts.push(t("first", { seconds: message.firstToken.toFixed(2) }));
  return <span class="statistics">{parts.join(" · ")}</span>;
}

/** The tokens of the prompt, which are asked for when the fold is opened. */
function PromptTokens(props: { message: AssistantMessage; conversation: Conversation; side: Side }): JSX.Element {
  const t = useWords(WORDS);
  const [tokens, setTokens] = useState<Token[] | undefined>(undefined);
  const [problem, setProblem] = useState("");
  const open = async (opened: boolean) => {
    if (!opened || tokens) return;
    const messages = props.conversation.value;
    const before = messages.slice(0, messages.findIndex(({ key }) => key === props.message.key));
    const server = serverOf(props.side);
    try {
      const settings = { ...currentSettings(props.side), plain: props.message.plain };
      setTokens(await tokenize(server, promptFields(before, settings, server.model)));
    } catch (error) {
      setProblem(explain(error, server.base, t));
    }
  };
  return (
    <details class="fold" onToggle={(event) => void open(event.currentTarget.open)}>
      <summary>{t("promptTokens")}</summary>
      {problem && <p class="note">{t("noTokenize", { reason: problem })}</p>}
      {tokens && <Tokens tokens={tokens} label={t("promptTokens")} />}
    </details>
  );
}

function CallCard(props: { call: Call; conversation: Conversation }): JSX.Element {
  const t = useWords(WORDS);
  const { call } = props;
  const [text, setText] = useState("");
  const states = {
    writing: "callWriting", running: "callRunning", waiting: "callWaiting", done: "callDone", failed: "callFailed",
  } as const;
  return (
    <section class={`card call ${call.state}`} aria-label={call.name}>
      <header>
        <span class="call-name mono">{call.name}</span>
        <span class="call-state">{t(states[call.state])}</span>
      </header>
      <h3>{t("arguments")}</h3>
      <pre>{pretty(call.arguments)}</pre>
      {call.result !== undefined && <h3>{t("result")}</h3>}
      {call.result !== undefined && <pre>{pretty(call.result)}</pre>}
      {call.state === "waiting" && (
        <form
          onSubmit={(event) => {
            event.preventDefault();
            props.conversation.giveResult(call.id, text);
          }}
        >
          <textarea rows={2} aria-label={t("result")} value={text} onInput={(e) => setText(e.currentTarget.value)} />
          <button class="primary">{t("giveResult")}</button>
        </form>
      )}
    </section>
  );
}
