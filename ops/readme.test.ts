/** The README, tried: its snippets in a real browser, its line of output, its table of defaults. */
import { expect, test } from "bun:test";
import { configFromEnv } from "../server.ts";
import { openPage, whyNoBrowser } from "./shared/browser.ts";
import { RelayProcess } from "./shared/processes.ts";
import { testRelay } from "./shared/relay.ts";

const readme = await Bun.file(new URL("../README.md", import.meta.url)).text();
const snippets = [...readme.matchAll(/```js\n([\s\S]*?)```/g)].map(([, code]) => code as string);

test.skipIf(whyNoBrowser !== undefined)(
  `README: host and guest talk, from pages of another origin, in a browser${whyNoBrowser ?? ""}`,
  async () => {
    await using relay = testRelay({ instance: "m1" });
    using site = Bun.serve({
      port: 0,
      fetch: () => new Response("<!doctype html><title>a game</title>", { headers: { "Content-Type": "text/html" } }),
    });
    /** A page whose console we type into; its WebSockets to port 3000 reach the test's relay. */
    const openConsole = async () => {
      const page = openPage();
      await page.navigate(`http://127.0.0.1:${site.port}/`);
      await page.evaluate(`(() => {
        window.lines = [];
        console.log = (...words) => lines.push(words.join(" "));
        window.WebSocket = class extends WebSocket {
          constructor(url) { super(url.replace("localhost:3000", "localhost:${relay.port}")); }
        };
      })()`);
      return {
        paste: (code: string) =>
          page.evaluate(
            `void document.head.append(Object.assign(document.createElement("script"), { textContent: ${JSON.stringify(code)} }))`,
          ),
        evaluate: (code: string) => page.evaluate(code) as Promise<unknown>,
        /** Waits for the line that starts so. */
        line: (start: string) =>
          page.evaluate(`new Promise((resolve) => {
            const look = () => {
              const at = lines.findIndex((line) => line.startsWith(${JSON.stringify(start)}));
              if (at < 0) setTimeout(look, 5);
              else resolve(lines.splice(at, 1)[0]);
            };
            look();
          })`) as Promise<string>,
        [Symbol.dispose]: () => page.close(),
      };
    };
    const [create, join, broadcast, targeted] = snippets as [string, string, string, string];
    using hostPage = await openConsole();
    using guestPage = await openConsole();

    await hostPage.paste(create);
    const created = JSON.parse((await hostPage.line('host: {"type":"created"')).slice(6)) as { room: string };
    await guestPage.evaluate(`void (window.prompt = () => ${JSON.stringify(created.room)})`);
    await guestPage.paste(join);
    expect(await guestPage.line("guest:")).toBe(`guest: {"type":"joined","room":"${created.room}","index":1,"peers":[0]}`);
    expect(await hostPage.line("host:")).toBe('host: {"type":"peer_joined","index":1}');
    await guestPage.paste(broadcast);
    expect(await hostPage.line("host:")).toBe('host: {"type":"message","from":1,"data":{"hello":"everyone"}}');
    await hostPage.paste(targeted);
    expect(await guestPage.line("guest:")).toBe('guest: {"type":"message","from":0,"data":"only for slot 1"}');

    const looked = `fetch("http://localhost:${relay.port}/room/${created.room}").then(async (r) => [r.headers.get("X-Instance-Id"), await r.json()])`;
    expect(await guestPage.evaluate(looked)).toEqual([
      "m1",
      { clients: 2, maxClients: 8, origin: `http://127.0.0.1:${site.port}` },
    ]);

    using again = await openConsole();
    await again.evaluate(`void (window.prompt = () => ${JSON.stringify(created.room)})`);
    await again.paste(join);
    expect(await again.line("guest:")).toContain('"index":1,"peers":[0]');
    expect(await guestPage.line("guest: closed")).toBe("guest: closed 4000 replaced");
  },
  20_000,
);

test("README: `bun run server.ts` prints the line that it shows", async () => {
  const [, shown] = /```\n(party-sockets listening [^\n]*)\n```/.exec(readme) as RegExpExecArray;
  await using relay = await RelayProcess.start({ IDLE_EXIT_SECONDS: undefined });
  expect(relay.lines[0]?.replaceAll(`${relay.port}`, "3000")).toBe(shown as string);
  expect(await relay.stop("SIGTERM")).toBe(0);
});

test("README: the table's defaults are the relay's", () => {
  const config = configFromEnv({}) as unknown as Record<string, unknown>;
  const rows = [...readme.matchAll(/^\| `([A-Z_]+)` +\| (\d+) +\|/gm)];
  expect(rows.length).toBe(10);
  for (const [, name, value] of rows) {
    const key = (name as string).toLowerCase().replace(/_(.)/g, (_, letter: string) => letter.toUpperCase());
    expect([name, config[key]]).toEqual([name, Number(value)]);
  }
});

test("README: names the Bun version that package.json pins", async () => {
  const { packageManager } = (await Bun.file(new URL("../package.json", import.meta.url)).json()) as {
    packageManager: string;
  };
  const named = [...readme.matchAll(/\bbun@[\d.]+\d/g)].map(([text]) => text);
  expect(named.length).toBeGreaterThan(2);
  expect(new Set(named)).toEqual(new Set([packageManager]));
});
