/** Seconds as "1:02:03" or "2:03". */
export function duration(seconds: number): string {
  const whole = Math.max(0, Math.round(seconds));
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (number: number) => String(number).padStart(2, "0");
  return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
}

/** Seconds since the epoch as local date and time. */
export function moment(seconds: number): string {
  if (!seconds) return "–";
  const date = new Date(seconds * 1000);
  const two = (number: number) => String(number).padStart(2, "0");
  const day = `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
  return `${day} ${two(date.getHours())}:${two(date.getMinutes())}`;
}

/** A number with about four digits. */
export function short(value: number | undefined): string {
  if (value === undefined) return "–";
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6)) return value.toExponential(2);
  return Number.isInteger(value) ? String(value) : value.toPrecision(4);
}

/** Mebibytes as GiB. */
export function gib(mib: number): string {
  return `${(mib / 1024).toFixed(1)} GiB`;
}

/** The last part of a path that tells files apart: of checkpoints that of the folder above. */
export function tail(path: string): string {
  const parts = path.split("/").filter(Boolean);
  return parts.slice(-3).join("/");
}
