import "../shared/base.css";
import "./chat.css";
import { render, type JSX } from "preact";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { language, useWords } from "../shared/i18n";
import { useStore } from "../shared/store";
import { Header } from "../shared/widgets";
import { explain } from "./connection";
import { Answer, isEnter, Question } from "./messages";
import { SettingsPanel } from "./settings";
import {
  bases, chooseServer, chosenModels, comparing, connections, conversations, isPlain, LETTERS, parameters, serverOf,
  useConnection, useServerTools, type Side,
} from "./state";
import { BEGINNINGS, EXAMPLES, WORDS } from "./words";

const WIDE = matchMedia("(min-width: 900px)");

function Page(): JSX.Element {
  const t = useWords(WORDS);
  const both = useStore(comparing);
  const [showSettings, setShowSettings] = useState(WIDE.matches);
  const busy = conversations.map((conversation) => useStore(conversation.busy)).some(Boolean);
  useServerTools();
  useEffect(() => {
    document.title = t("title");
  });
  useEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      // Escape also ends the input of a Chinese word, and the editing of a message.
      if (event.key !== "Escape" || event.isComposing || event.defaultPrevented) return;
      if (conversations.some((conversation) => conversation.busy.value)) stop();
      else if (!WIDE.matches) setShowSettings(false);
    };
    document.addEventListener("keydown", onKey);
    return () => document.removeEventListener("keydown", onKey);
  }, []);
  const compare = () => {
    if (both) conversations[1]!.clear();
    comparing.set(!both);
  };
  return (
    <div class="page">
      <Header title={t("title")}>
        <button class="quiet" type="button" onClick={() => conversations.forEach((conversation) => conversation.clear())}>
          {t("newChat")}
        </button>
        <button class="quiet" type="button" aria-pressed={both} onClick={compare}>{t("compare")}</button>
        <button
          class="quiet"
          type="button"
          aria-expanded={showSettings}
          aria-controls="settings"
          onClick={() => setShowSettings(!showSettings)}
        >
          {t("settings")}
        </button>
      </Header>
      <div class="layout">
        <SettingsPanel hidden={!showSettings} />
        <main>
          <div class={`columns${both ? " both" : ""}`}>
            <Column side={0} both={both} />
            {both && <Column side={1} both={both} />}
          </div>
          <Composer busy={busy} both={both} />
        </main>
      </div>
      <div class="sr-only" role="status">{busy ? t("writing") : conversations[0]!.value.length ? t("complete") : ""}</div>
    </div>
  );
}

function stop(): void {
  conversations.forEach((conversation) => conversation.stop());
}

function ask(text: string): void {
  const sides = comparing.value ? conversations : conversations.slice(0, 1);
  for (const conversation of sides) void conversation.send(text);
}

function Column({ side, both }: { side: Side; both: boolean }): JSX.Element {
  const t = useWords(WORDS);
  useConnection(side);
  useStore(chosenModels);
  const base = useStore(bases)[side]!;
  const connection = useStore(connections[side]!);
  const conversation = conversations[side]!;
  const messages = useStore(conversation);
  const busy = useStore(conversation.busy);
  const scroller = useRef<HTMLDivElement>(null);
  const follow = useRef(true);
  useLayoutEffect(() => {
    const element = scroller.current;
    if (element && follow.current) element.scrollTop = element.scrollHeight;
  }, [messages]);
  const { model } = serverOf(side);
  const label = both ? t("conversationWith", { side: LETTERS[side] }) : t("conversation");
  return (
    <section class="column" aria-label={label}>
      {(both || base) && (
        <p class="column-title">
          {both && <b>{LETTERS[side]}</b>} {model || t("noModel")} <small>{base || t("thisServer")}</small>
        </p>
      )}
      <div
        ref={scroller}
        class="scroller"
        tabIndex={0}
        role="group"
        aria-label={label}
        onScroll={(event) => {
          const { scrollTop, scrollHeight, clientHeight } = event.currentTarget;
          follow.current = scrollHeight - scrollTop - clientHeight < 60;
        }}
      >
        {messages.length === 0 && <Welcome side={side} both={both} />}
        {connection.state === "failed" && messages.length === 0 && (
          <p class="notice bad" role="alert">{explain(connection.error, base, t)}</p>
        )}
        <ol class="messages">
          {messages.map((message) =>
            message.role === "user" ? (
              <Question key={message.key} message={message} conversation={conversation} busy={busy} />
            ) : (
              <Answer key={message.key} {...{ message, conversation, side, busy }} />
            ),
          )}
        </ol>
      </div>
    </section>
  );
}

function Welcome({ side, both }: { side: Side; both: boolean }): JSX.Element {
  const t = useWords(WORDS);
  useStore(parameters);
  const plain = isPlain(side);
  const examples = (plain ? BEGINNINGS : EXAMPLES)[useStore(language)];
  const { state } = useStore(connections[side]!);
  const base = useStore(bases)[side]!;
  if (state === "unasked") {
    const choose = (chosen: string) => {
      chooseServer(side, chosen);
      document.querySelector<HTMLElement>(".composer textarea")!.focus(); // the buttons disappear
    };
    return (
      <div class="welcome">
        <p>{t("unasked")}</p>
        <p class="welcome-model">{base}</p>
        <div class="examples">
          <button type="button" onClick={() => choose(base)}>{t("connect")}</button>
          <button type="button" onClick={() => choose("")}>{t("useThisServer")}</button>
        </div>
      </div>
    );
  }
  return (
    <div class="welcome">
      <p class="welcome-model">{state === "connecting" ? t("connecting") : serverOf(side).model}</p>
      {state !== "failed" && <p>{t(plain ? "welcomePlain" : "welcome")}</p>}
      {!both && state === "ready" && (
        <div class="examples">
          {examples.map((text) => (
            <button key={text} type="button" onClick={() => ask(text)}>{text}</button>
          ))}
        </div>
      )}
    </div>
  );
}

function Composer({ busy, both }: { busy: boolean; both: boolean }): JSX.Element {
  const t = useWords(WORDS);
  const [text, setText] = useState("");
  const area = useRef<HTMLTextAreaElement>(null);
  const states = [useStore(connections[0]!), useStore(connections[1]!)].slice(0, both ? 2 : 1);
  const ready = states.every(({ state }) => state === "ready");
  const send = () => {
    if (!text.trim() || busy || !ready) return;
    setText("");
    ask(text);
  };
  useLayoutEffect(() => {
    const element = area.current!;
    element.style.height = "auto";
    element.style.height = `${Math.min(element.scrollHeight + 2, 240)}px`;
  }, [text]);
  return (
    <form
      class="composer"
      onSubmit={(event) => {
        event.preventDefault();
        send();
      }}
    >
      <textarea
        ref={area}
        rows={1}
        autofocus
        aria-label={t("question")}
        placeholder={t("placeholder")}
        value={text}
        onInput={(event) => setText(event.currentTarget.value)}
        onKeyDown={(event) => {
          if (!isEnter(event)) return;
          event.preventDefault();
          send();
        }}
      />
      {busy ? (
        <button type="button" class="danger" onClick={stop}>{t("stopKey")}</button>
      ) : (
        <button class="primary" disabled={!text.trim() || !ready}>{t("send")}</button>
      )}
    </form>
  );
}

render(<Page />, document.getElementById("app")!);
