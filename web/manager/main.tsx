import "../shared/base.css";
import "./manager.css";
import { render, type JSX } from "preact";
import { useCallback, useEffect, useRef, useState } from "preact/hooks";
import { useStore } from "../shared/store";
import { Field, Header } from "../shared/widgets";
import { ApiError, get, refused, takeToken, token, type Info, type Job } from "./api";
import { moment } from "./format";
import { NewJob } from "./form";
import { JobPage, StateBadge } from "./job";
import { Compare, Overview } from "./overview";
import { useText } from "./words";

const SECONDS = 2;

function useHash(): string {
  const [hash, setHash] = useState(location.hash);
  useEffect(() => {
    const changed = () => {
      takeToken();
      setHash(location.hash);
    };
    addEventListener("hashchange", changed);
    return () => removeEventListener("hashchange", changed);
  }, []);
  return hash;
}

/** Asks for the token of a manager whose address was opened without it. */
function Gate(): JSX.Element {
  const t = useText();
  const [text, setText] = useState("");
  const isRefused = useStore(refused);
  return (
    <main class="gate">
      <form
        class="card"
        onSubmit={(event) => {
          event.preventDefault();
          token.set(text.trim());
        }}
      >
        <p>{t("tokenText")}</p>
        {isRefused && (
          <p class="notice bad" role="alert">
            {t("tokenWrong")}
          </p>
        )}
        <Field label={t("token")}>
          <input type="password" autocomplete="off" value={text} onInput={(e) => setText(e.currentTarget.value)} />
        </Field>
        <button class="primary" type="submit" disabled={!text.trim()}>
          {t("enter")}
        </button>
      </form>
    </main>
  );
}

function Manager(): JSX.Element {
  const t = useText();
  const hash = useHash();
  const [info, setInfo] = useState<Info>();
  const [jobs, setJobs] = useState<Job[]>([]);
  const [lost, setLost] = useState(false);
  const [marked, setMarked] = useState<string[]>([]);
  const main = useRef<HTMLElement>(null);
  const load = useCallback(async () => {
    try {
      setJobs((await get<{ jobs: Job[] }>("/api/jobs")).jobs);
      setLost(false);
    } catch (error) {
      setLost(!(error instanceof ApiError));
    }
  }, []);
  useEffect(() => {
    void load();
    const timer = setInterval(load, SECONDS * 1000);
    return () => clearInterval(timer);
  }, [load]);
  useEffect(() => {
    if (!info) get<Info>("/api/info").then(setInfo, () => undefined);
  }, [info, lost]);
  const shown = useRef(hash);
  useEffect(() => {
    // Only after a change of the page: the first Tab must reach the link to the content.
    if (shown.current !== hash) main.current?.querySelector<HTMLElement>("h2")?.focus({ preventScroll: true });
    shown.current = hash;
  }, [hash]);

  const [, page = "", argument = ""] = hash.split("/");
  const compared = marked.filter((id) => jobs.some((job) => job.id === id)); // others are deleted
  const mark = (id: string, is: boolean) => setMarked((old) => (is ? [...old, id] : old.filter((one) => one !== id)));
  return (
    <div class="columns">
      <nav class="jobs" aria-label={t("jobs")}>
        <a class="button primary" href="#/new">
          {t("newJob")}
        </a>
        <a class="plain" href="#/" aria-current={page === "" ? "page" : undefined}>
          {t("devices")}
        </a>
        {compared.length > 1 ? (
          <a class="button" href={`#/compare/${compared.join(",")}`}>
            {t("compare")} ({compared.length})
          </a>
        ) : (
          jobs.length > 1 && <p class="hint">{t("compareHint")}</p>
        )}
        <ul>
          {jobs.map((job) => (
            <li key={job.id} class={argument === job.id ? "chosen" : ""}>
              <input
                type="checkbox"
                aria-label={t("mark", { name: job.name })}
                checked={marked.includes(job.id)}
                onChange={(event) => mark(job.id, event.currentTarget.checked)}
              />
              <a href={`#/jobs/${job.id}`} aria-current={argument === job.id ? "page" : undefined}>
                <span class="job-name">{job.name}</span>
                <span class="hint">
                  {job.stage} · {moment(job.created).slice(5)}
                </span>
              </a>
              <StateBadge state={job.state} />
            </li>
          ))}
        </ul>
      </nav>
      <main ref={main} id="main">
        {lost && (
          <p class="notice bad" role="alert">
            {t("lost")}
          </p>
        )}
        {page === "new" && info ? (
          <NewJob
            info={info}
            started={(job) => {
              void load();
              location.hash = `#/jobs/${job.id}`;
            }}
          />
        ) : page === "jobs" ? (
          <JobPage id={argument} changed={load} />
        ) : page === "compare" ? (
          <Compare ids={argument.split(",")} jobs={jobs} />
        ) : (
          <Overview jobs={jobs} />
        )}
      </main>
    </div>
  );
}

function Page(): JSX.Element {
  const t = useText();
  const hasToken = useStore(token) !== "";
  useEffect(() => {
    document.title = t("title");
  });
  return (
    <>
      <a class="skip" href="#main" onClick={(event) => {
        event.preventDefault();
        document.querySelector<HTMLElement>("main h2")?.focus();
      }}>
        {t("skip")}
      </a>
      <Header title={t("title")} />
      {hasToken ? <Manager /> : <Gate />}
    </>
  );
}

takeToken();
render(<Page />, document.getElementById("app")!);
