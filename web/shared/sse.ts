/** One server-sent event. */
export interface ServerEvent {
  event: string;
  data: string;
  id: string;
}

/**
 * The events of a response's body. `fetch` is used and not EventSource, which can send neither a body nor a key.
 */
export async function* serverEvents(body: ReadableStream<Uint8Array>): AsyncGenerator<ServerEvent> {
  const reader = body.pipeThrough(new TextDecoderStream() as ReadableWritablePair<string, Uint8Array>).getReader();
  let rest = ""; // of the last line
  let cr = ""; // at the end of a piece: it may be the first half of CR LF
  let found: ServerEvent & { lines: string[] } = empty();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const piece = cr + value;
      cr = piece.endsWith("\r") ? "\r" : "";
      // Only the new piece is searched: a long line comes in many.
      const lines = piece.slice(0, piece.length - cr.length).split(/\r\n|\n|\r/);
      lines[0] = rest + lines[0]!;
      rest = lines.pop() ?? "";
      for (const line of lines) {
        if (line === "") {
          if (found.lines.length) yield { event: found.event, data: found.lines.join("\n"), id: found.id };
          found = { ...empty(), id: found.id };
          continue;
        }
        const colon = line.indexOf(":");
        const name = colon < 0 ? line : line.slice(0, colon);
        const text = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
        if (name === "data") found.lines.push(text);
        else if (name === "event") found.event = text;
        else if (name === "id") found.id = text;
      }
    }
  } finally {
    await reader.cancel().catch(() => undefined); // also when the consumer stops early
  }
}

function empty(): ServerEvent & { lines: string[] } {
  return { event: "message", data: "", id: "", lines: [] };
}
