/** What only a real browser shows of the client: how tabs are closed, kept and brought back, and what it says of the network. */
import { describe, expect, test } from "bun:test";
import { openPage, whyNoBrowser } from "../shared/browser.ts";
import { parseMetrics, scrape } from "../shared/metrics.ts";
import { Client } from "../shared/client.ts";
import { testRelay } from "../shared/relay.ts";
import { until, within } from "../shared/wait.ts";

const PAGE = `<!doctype html><title>Game</title><script type="module">
  import { connect } from "/party.js";
  const query = new URLSearchParams(location.search);
  globalThis.party = connect({ url: query.get("relay"), room: query.get("room") });
  globalThis.states = [];
  party.on("status", ({ state, reason }) => states.push(reason ? state + ": " + reason : state));
</script>`;

/** A page that joins the room in its query, in plain JavaScript. */
async function servePage() {
  const source = await Bun.file(`${import.meta.dir}/party.ts`).text();
  const script = new Bun.Transpiler({ loader: "ts" }).transformSync(source);
  const type = (type: string) => ({ headers: { "Content-Type": type } });
  return Bun.serve({
    port: 0,
    routes: {
      "/": () => new Response(PAGE, type("text/html")),
      "/party.js": () => new Response(script, type("text/javascript")),
      "/elsewhere": () => new Response("<!doctype html><title>Elsewhere</title>", type("text/html")),
    },
    fetch: () => new Response("Not found", { status: 404 }),
  });
}

const TABS = 4;
/** A browser may take its time on a machine that is busy; what is awaited has deadlines of its own. */
const inBrowser = (name: string, run: () => Promise<void>) => test.skipIf(whyNoBrowser !== undefined)(name, run, 30_000);

describe("in a browser" + (whyNoBrowser ?? ""), () => {
  /** A relay, a room with a host, and the address of a page that joins it. */
  async function place() {
    const relay = testRelay();
    const server = await servePage();
    const host = await Client.open(relay.url);
    const room = await host.create(20);
    const url = `http://localhost:${server.port}/?${new URLSearchParams({ relay: relay.url, room })}`;
    return {
      ...{ relay, host, url, elsewhere: `http://localhost:${server.port}/elsewhere` },
      async [Symbol.asyncDispose]() {
        host.terminate();
        await server.stop(true);
        await relay[Symbol.asyncDispose]();
      },
    };
  }
  const next = (host: Client) => within(host.next(), "a frame to the host");
  const states = (page: Bun.WebView) => page.evaluate<string[]>("globalThis.states ?? []");
  const index = (page: Bun.WebView) => page.evaluate<number | null>("globalThis.party?.me() ?? null");
  async function connections(url: string): Promise<number> {
    const samples = parseMetrics(await scrape(url)).filter(({ name }) => name === "party_sockets_connections_total");
    return samples.reduce((sum, { value }) => sum + value, 0);
  }

  inBrowser("tabs that are opened and closed cost one connection each, and no ghost joins", async () => {
    await using at = await place();
    for (let index = 1; index <= TABS; index++) {
      const page = openPage();
      await page.navigate(at.url);
      expect(await next(at.host)).toEqual({ type: "peer_joined", index });
      page.close();
      expect(await next(at.host)).toEqual({ type: "peer_left", index });
    }
    expect(await at.host.soFar()).toEqual([]);
    expect(await connections(at.relay.url)).toBe(1 + TABS);
  });

  inBrowser("pages that are left cost one connection each, and the way back brings the slot back", async () => {
    await using at = await place();
    using page = openPage();
    await page.navigate(at.url);
    expect(await next(at.host)).toEqual({ type: "peer_joined", index: 1 });
    for (let i = 1; i <= 5; i++) {
      await page.navigate(at.elsewhere);
      expect(await next(at.host)).toEqual({ type: "peer_left", index: 1 });
      await page.evaluate("void history.back()");
      expect(await next(at.host)).toEqual({ type: "peer_joined", index: 1, resumed: true });
    }
    expect(await connections(at.relay.url)).toBe(1 + 6);
  });

  inBrowser("a reload keeps the slot", async () => {
    await using at = await place();
    using page = openPage();
    await page.navigate(at.url);
    await until("the slot", async () => (await index(page)) === 1);
    await page.reload();
    await until("the slot", async () => (await index(page)) === 1);
  });

  inBrowser("believes the browser that it is offline, and comes back when it is online", async () => {
    await using at = await place();
    using page = openPage();
    await page.navigate(at.url);
    expect(await next(at.host)).toEqual({ type: "peer_joined", index: 1 });
    await until("the room", async () => (await states(page)).at(-1) === "open");
    await page.cdp("Network.enable");
    const emulate = (offline: boolean) =>
      page.cdp("Network.emulateNetworkConditions", { offline, latency: 0, downloadThroughput: -1, uploadThroughput: -1 });
    await emulate(true);
    await until("the state", async () => (await states(page)).includes("waiting: offline"));
    expect(await next(at.host)).toEqual({ type: "peer_left", index: 1 });
    await emulate(false);
    expect(await next(at.host)).toEqual({ type: "peer_joined", index: 1, resumed: true });
    await until("the room", async () => (await states(page)).at(-1) === "open");
  });
});
