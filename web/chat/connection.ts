import type { Translate } from "../shared/i18n";
import { ServerError } from "./server";
import type { Word } from "./words";

/** Why a request failed, and what to do. */
export function explain(error: unknown, base: string, t: Translate<Word>): string {
  if (!(error instanceof ServerError)) return String(error);
  if (error.status === 401) return t("needsKey");
  if (error.status === 0) return t("noAnswer", { address: base || location.origin, origin: location.origin });
  return error.message;
}
