/** What a tokenizer.json holds of the parts that MiniMind's tokenizers use. */
export interface TokenizerFile {
  added_tokens: { id: number; content: string; lstrip?: boolean; rstrip?: boolean; single_word?: boolean }[];
  normalizer: unknown;
  pre_tokenizer: PreTokenizer | null;
  model: { type: string; vocab: Record<string, number>; merges: (string | [string, string])[]; ignore_merges?: boolean };
}

export interface PreTokenizer {
  type: string;
  pretokenizers?: PreTokenizer[];
  individual_digits?: boolean;
  add_prefix_space?: boolean;
  use_regex?: boolean;
}

export interface Token {
  id: number;
  text: string;
  /** The piece of the text that the token is part of; null for an added token. */
  piece: string | null;
}

/** GPT-2's alphabet: a printable character for each of the 256 bytes. */
function alphabet(): string[] {
  const printable = (byte: number) =>
    (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || (byte >= 174 && byte <= 255);
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCharCode(printable(byte) ? byte : next++));
}

const BYTES = alphabet();
const VALUES = new Map(BYTES.map((character, byte) => [character, byte]));
// The tokenizers library's blank is Unicode's White_Space, which differs from JavaScript's \s in two characters.
const BLANK = "\\t-\\r \\x85\\xA0\\u1680\\u2000-\\u200A\\u2028\\u2029\\u202F\\u205F\\u3000";
const WORDS = new RegExp(
  `'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^${BLANK}\\p{L}\\p{N}]+|[${BLANK}]+(?![^${BLANK}])|[${BLANK}]+`,
  "gu",
);

/** Split at each match and keep the matches. */
function isolate(pieces: string[], pattern: RegExp): string[] {
  return pieces.flatMap((piece) => piece.split(pattern).filter((part) => part !== ""));
}

function split(pieces: string[], how: PreTokenizer | null): string[] {
  if (how === null) return pieces;
  if (how.type === "Sequence") return (how.pretokenizers ?? []).reduce(split, pieces);
  if (how.type === "Digits") return isolate(pieces, how.individual_digits ? /(\p{N})/u : /(\p{N}+)/u);
  return pieces.flatMap((piece) => piece.match(WORDS) ?? []);
}

/** Byte-level byte-pair encoding, with the ids of the tokenizers library. */
export class Tokenizer {
  readonly size: number;
  private ranks: Map<string, number>;
  private vocab: Map<string, number>;
  private added: Map<string, number>;
  private pattern: RegExp | null;

  constructor(private file: TokenizerFile) {
    const merges = file.model.merges.map((pair) => (typeof pair === "string" ? pair : pair.join(" ")));
    this.ranks = new Map(merges.map((pair, rank) => [pair, rank]));
    this.vocab = new Map(Object.entries(file.model.vocab));
    this.added = new Map(file.added_tokens.map((token) => [token.content, token.id]));
    this.size = new Set([...this.vocab.values(), ...this.added.values()]).size;
    const names = [...this.added.keys()].sort((one, other) => other.length - one.length);
    const escaped = names.map((name) => name.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    this.pattern = names.length ? new RegExp(`(${escaped.join("|")})`, "u") : null;
  }

  encode(text: string): Token[] {
    const parts = this.pattern ? isolate([text], this.pattern) : [text];
    return parts.flatMap((part): Token[] => {
      const id = this.added.get(part);
      if (id !== undefined) return [{ id, text: part, piece: null }];
      return split([part], this.file.pre_tokenizer).flatMap((piece) =>
        this.merge(piece).map((symbol) => ({ id: this.vocab.get(symbol)!, text: decode(symbol), piece })),
      );
    });
  }

  /** The symbols of a piece after each merge; the first entry has single bytes. */
  steps(piece: string): string[][] {
    const found: string[][] = [];
    this.merge(piece, (symbols) => found.push(symbols.map(decode)));
    return found;
  }

  /** The symbols of a piece after all merges. A piece may have thousands of bytes, so each merge updates only two ranks. */
  private merge(piece: string, see?: (symbols: readonly string[]) => void): string[] {
    const symbols = [...new TextEncoder().encode(piece)].map((byte) => BYTES[byte]!);
    const rank = (i: number) => this.ranks.get(`${symbols[i]} ${symbols[i + 1]}`) ?? Infinity;
    const ranks = symbols.slice(1).map((_, i) => rank(i)); // of each symbol and the next one
    for (;;) {
      see?.(symbols);
      let place = 0;
      for (let i = 1; i < ranks.length; i++) if (ranks[i]! < ranks[place]!) place = i;
      if ((ranks[place] ?? Infinity) === Infinity) return symbols;
      symbols.splice(place, 2, symbols[place]! + symbols[place + 1]!);
      ranks.splice(place, 1);
      if (place > 0) ranks[place - 1] = rank(place - 1);
      if (place < ranks.length) ranks[place] = rank(place);
    }
  }
}

const DECODER = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/** The text of a symbol; of bytes that are no whole character, their hexadecimal numbers. */
function decode(symbol: string): string {
  const values = [...symbol].map((character) => VALUES.get(character)!);
  try {
    return DECODER.decode(new Uint8Array(values));
  } catch {
    return values.map((value) => `‹${value.toString(16).padStart(2, "0")}›`).join("");
  }
}

/** The kit's own figure as a tokenizer.json: ids are added tokens, then the bytes, then the merges. */
export function fromFigure(figure: { added: string[]; merges: string[]; pre_tokenizer: PreTokenizer }): TokenizerFile {
  const bytes = [...BYTES].sort((one, other) => one.charCodeAt(0) - other.charCodeAt(0));
  const listed = [...figure.added, ...bytes, ...figure.merges.map((pair) => pair.replace(" ", ""))];
  return {
    added_tokens: figure.added.map((content, id) => ({ id, content })),
    normalizer: null,
    pre_tokenizer: figure.pre_tokenizer,
    model: { type: "BPE", vocab: Object.fromEntries(listed.map((token, id) => [token, id])), merges: figure.merges },
  };
}

/** What this page cannot run of a tokenizer.json; "" if it can run all. */
export function unsupported(file: Partial<TokenizerFile>): string {
  const flat = (how: PreTokenizer): PreTokenizer[] => (how.type === "Sequence" ? (how.pretokenizers ?? []).flatMap(flat) : [how]);
  const vocab = file.model?.vocab;
  if (file.model?.type !== "BPE" || !vocab || !Array.isArray(file.model.merges)) return "no model BPE";
  if (BYTES.some((byte) => vocab[byte] === undefined)) return "a vocabulary without all 256 bytes";
  if (file.normalizer) return "normalizer";
  if (file.model.ignore_merges) return "ignore_merges";
  const trims = file.added_tokens?.some((token) => token.lstrip || token.rstrip || token.single_word);
  if (trims) return "added tokens with lstrip, rstrip or single_word";
  const parts = file.pre_tokenizer ? flat(file.pre_tokenizer) : [];
  const last = parts.pop();
  if (last?.type !== "ByteLevel") return `pre_tokenizer ${last?.type ?? "null"} at the end`;
  if (last.add_prefix_space || last.use_regex === false) return "ByteLevel with add_prefix_space or without use_regex";
  const other = parts.find((part) => part.type !== "Digits");
  return other ? `pre_tokenizer ${other.type} before ByteLevel` : "";
}
