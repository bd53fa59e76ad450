import { useEffect, useState } from "preact/hooks";

/** A value that components re-render for. */
export class Store<T> {
  private listeners = new Set<() => void>();

  constructor(private current: T) {}

  get value(): T {
    return this.current;
  }

  set(value: T): void {
    this.current = value;
    for (const listener of [...this.listeners]) listener();
  }

  /** Call `listener` at each change; the result ends that. */
  subscribe(listener: () => void): () => void {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }
}

/** The value of a store; the component re-renders when it changes. */
export function useStore<T>(store: Store<T>): T {
  const [, update] = useState(0);
  useEffect(() => store.subscribe(() => update((count) => count + 1)), [store]);
  return store.value;
}

/** A store whose JSON is kept in localStorage or sessionStorage. Without storage it lasts as long as the page. */
export function kept<T>(name: string, initial: T, storage: () => Storage = () => localStorage): Store<T> {
  let value = initial;
  try {
    const text = storage().getItem(name);
    if (text !== null) value = JSON.parse(text) as T;
  } catch {
    // blocked by the browser, or damaged
  }
  const store = new Store(value);
  store.subscribe(() => {
    try {
      storage().setItem(name, JSON.stringify(store.value));
    } catch {
      // blocked by the browser, or full
    }
  });
  return store;
}
