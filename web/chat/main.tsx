import "../shared/base.css";
import "./chat.css";
import { render } from "preact";
import { useWords, type Words } from "../shared/i18n";
import { Header } from "../shared/widgets";

const WORDS = {
  title: ["MiniMind Chat", "MiniMind 对话"],
} satisfies Words<string>;

function Page() {
  const t = useWords(WORDS);
  return (
    <>
      <Header title={t("title")} />
      <main />
    </>
  );
}

render(<Page />, document.getElementById("app")!);
