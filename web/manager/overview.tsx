import type { JSX } from "preact";
import { useEffect, useMemo, useState } from "preact/hooks";
import { get, type Device, type Job, type Row } from "./api";
import { ChartCard } from "./chart";
import { gib, short } from "./format";
import { columns, points } from "./job";
import { useText } from "./words";

const SECONDS = 5;

/** The devices of the host, and who uses them. */
export function Overview(props: { jobs: Job[] }): JSX.Element {
  const t = useText();
  const [devices, setDevices] = useState<Device[]>([]);
  useEffect(() => {
    const load = () =>
      get<{ devices: Device[] }>("/api/devices").then(
        (found) => setDevices(found.devices),
        () => undefined,
      );
    void load();
    const timer = setInterval(load, SECONDS * 1000);
    return () => clearInterval(timer);
  }, [props.jobs.filter((job) => job.state === "running").length]);
  const names = new Map(props.jobs.map((job) => [job.id, job.name]));
  const measured = (row: Device) => [row.power && `${row.power} W`, row.temperature && `${row.temperature} °C`];
  return (
    <section class="overview">
      <h2 tabIndex={-1}>{t("devices")}</h2>
      <div class="card scroll" tabIndex={0} role="region" aria-label={t("devices")}>
        <table>
          <thead>
            <tr>
              <th>{t("device")}</th>
              <th>{t("health")}</th>
              <th>{t("memory")}</th>
              <th>{t("load")}</th>
              <th>{t("jobs")}</th>
            </tr>
          </thead>
          <tbody>
            {devices.map((row) => (
              <tr key={`${row.kind}${row.number}`} class={row.usable ? "" : "unusable"}>
                <td>
                  <strong>
                    {row.kind} {row.load === null ? row.number : ""}
                  </strong>
                  <div class="hint">{row.name}</div>
                </td>
                <td class={row.health === "OK" ? "good" : "bad"}>{row.health}</td>
                <td>
                  <meter aria-label={t("memory")} min={0} max={row.total || 1} value={row.used} high={row.total * 0.9} />
                  <div class="hint">
                    {gib(row.used)} / {gib(row.total)}
                  </div>
                </td>
                <td>{row.load ?? (measured(row).filter(Boolean).join(", ") || "–")}</td>
                <td>
                  {row.jobs.map((id) => (
                    <div key={id}>
                      <a href={`#/jobs/${id}`}>{names.get(id) ?? id}</a>
                    </div>
                  ))}
                </td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
      <p class="hint">{props.jobs.length ? t("choose") : t("noJobs")}</p>
    </section>
  );
}

/** Curves of several jobs in one figure, and where their settings differ. */
export function Compare(props: { ids: string[]; jobs: Job[] }): JSX.Element {
  const t = useText();
  const [rows, setRows] = useState<Record<string, Row[]>>({});
  const [chosen, setChosen] = useState("");
  // Another browser may have deleted one.
  const wanted = props.ids.filter((id) => props.jobs.some((job) => job.id === id)).join(",");
  useEffect(() => {
    const load = () =>
      wanted &&
      get<{ jobs: Record<string, Row[]> }>(`/api/compare?jobs=${wanted}`).then(
        (found) => setRows(found.jobs),
        () => undefined,
      );
    void load();
    const timer = setInterval(load, SECONDS * 1000);
    return () => clearInterval(timer);
  }, [wanted]);
  const jobs = props.ids.map((id) => props.jobs.find((job) => job.id === id)).filter((job) => job !== undefined);
  const names = columns(Object.values(rows).flat());
  const column = names.includes(chosen) ? chosen : (names[0] ?? "");
  const curves = useMemo(
    () => jobs.map((job) => ({ label: `${job.name} · ${job.id.slice(-4)}`, points: points(rows[job.id] ?? [], column) })),
    [rows, column, jobs.length],
  );
  const values = (job: Job): Record<string, unknown> => ({ ...job.request, ...job.request.settings, settings: "" });
  const keys = [...new Set(jobs.flatMap((job) => Object.keys(values(job))))].filter(
    (key) => key !== "name" && new Set(jobs.map((job) => String(values(job)[key] ?? ""))).size > 1,
  );
  return (
    <section>
      <h2 tabIndex={-1}>{t("compare")}</h2>
      <ChartCard label={t("compare")} {...{ names, column, curves }} onChoose={setChosen} />
      <div class="card scroll" tabIndex={0} role="region" aria-label={t("settings")}>
        <table>
          <thead>
            <tr>
              <th>{t("difference")}</th>
              {jobs.map((job) => (
                <th key={job.id}>
                  <a href={`#/jobs/${job.id}`}>{job.name}</a>
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            {keys.map((key) => (
              <tr key={key}>
                <th scope="row" class="mono">
                  {key}
                </th>
                {jobs.map((job) => (
                  <td key={job.id} class="mono">
                    {String(values(job)[key] ?? "")}
                  </td>
                ))}
              </tr>
            ))}
            <tr>
              <th scope="row">
                {t("last")} ({column})
              </th>
              {jobs.map((job) => (
                <td key={job.id}>{short(points(rows[job.id] ?? [], column).at(-1)?.[1])}</td>
              ))}
            </tr>
          </tbody>
        </table>
      </div>
    </section>
  );
}
