import { kept } from "./store";

export type Theme = "system" | "light" | "dark";

export const theme = kept<Theme>("minimind.theme", "system");

function apply(): void {
  if (theme.value === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme.value;
}
theme.subscribe(apply);
apply();
