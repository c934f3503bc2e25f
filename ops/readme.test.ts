/** What stands in the README and the pages under `ops/`, tried: snippets, output, tables, links. */
import { describe, expect, test } from "bun:test";
import { existsSync } from "node:fs";
import { cp } from "node:fs/promises";
import { dirname, join } from "node:path";
import { CAPS, CloseCode, ConfigError, configFromEnv } from "../server.ts";
import { openPage, whyNoBrowser } from "./shared/browser.ts";
import { temporaryDirectory } from "./shared/directory.ts";
import { parseMetrics, scrape } from "./shared/metrics.ts";
import { Child, RelayProcess, ROOT } from "./shared/processes.ts";
import { testRelay } from "./shared/relay.ts";

const read = (path: string) => Bun.file(join(ROOT, path)).text();
const PAGES = ["README.md", ...[...new Bun.Glob("ops/**/*.md").scanSync(ROOT)].sort()];
const readme = await read("README.md");
const operators = await read("ops/operators.md");

/** The blocks of code in a language. */
const blocks = (page: string, language: string): string[] =>
  [...page.matchAll(new RegExp(`^\`\`\`${language}\\n([\\s\\S]*?)^\`\`\`$`, "gm"))].map(([, code]) => code as string);
/** What stands under a heading, up to the next one of any level. */
const section = (page: string, heading: string): string =>
  page.split(/^(?=#+ )/m).find((part) => part.startsWith(`#`) && part.split("\n")[0]?.replace(/^#+ /, "") === heading) ?? "";
/** The names in backticks in the first cell of a table's rows. */
const firstCells = (text: string): string[] =>
  [...text.matchAll(/^\| ([^|]*\S) +\|/gm)].flatMap(([, cell]) =>
    [...(cell as string).matchAll(/`([^`]+)`/g)].map(([, name]) => name as string),
  );

const snippets = blocks(readme, "js");

test("README: at most 1,500 words", () => {
  expect(readme.split(/\s+/).filter(Boolean).length).toBeLessThanOrEqual(1500);
});

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

test("README: an embedded relay is two files, and answers", async () => {
  await using directory = await temporaryDirectory("embedded");
  for (const name of ["server.ts", "regions.ts"]) await cp(join(ROOT, name), join(directory.path, name));
  const [embedding] = blocks(readme, "ts") as [string];
  const [, printed] = /^console\.log.*; \/\/ (.*)$/m.exec(embedding) as RegExpExecArray;
  await Bun.write(join(directory.path, "try.ts"), embedding);
  await using child = new Child([process.execPath, "run", "try.ts"], { cwd: directory.path });
  expect(await child.exited).toBe(0);
  expect(child.lines).toEqual([printed as string]);
});

test("README: screen and phone talk by the client", async () => {
  await using relay = testRelay();
  await using directory = await temporaryDirectory("client");
  await cp(join(ROOT, "ops/demo/party.ts"), join(directory.path, "party.ts"));
  const [imports, url, screen, phone] = (blocks(readme, "ts")[1] as string).split("\n\n") as [string, string, string, string];
  const start = async (name: string, ...lines: string[]) => {
    const here = url.replace("wss://relay.example", relay.url);
    await Bun.write(join(directory.path, name), [imports, here, ...lines].join("\n"));
    return new Child([process.execPath, "run", name], { cwd: directory.path });
  };
  await using host = await start("host.ts", screen);
  const [, code] = await host.line(/^Join with (\w{6})$/);
  await using guest = await start("guest.ts", `globalThis.prompt = () => "${code}";`, phone);
  await guest.line(/^open\b/);
  await host.line(/^1 \{/);
  expect(host.lines.join(" ")).toMatch(/1 \{\s*x: 1,\s*y: 2,?\s*\}/);
});

describe("README: the table of variables", () => {
  const table = section(readme, "Limits and configuration");

  test("has the relay's defaults", () => {
    const config = configFromEnv({}) as unknown as Record<string, unknown>;
    const rows = [...table.matchAll(/^\| `([A-Z_]+)` +\| (\d+) +\|/gm)];
    expect(rows.length).toBe(12);
    for (const [, name, value] of rows) {
      const key = (name as string).toLowerCase().replace(/_(.)/g, (_, letter: string) => letter.toUpperCase());
      expect([name, config[key]]).toEqual([name, Number(value)]);
    }
  });

  test("has every variable that the relay reads, and no other", () => {
    const names = new Set<string>();
    const env = new Proxy<Record<string, string>>(
      { PEERS: "a" },
      {
        get(values, name) {
          names.add(String(name));
          return values[String(name)];
        },
      },
    );
    expect(() => configFromEnv(env)).toThrow(ConfigError); // PEERS needs more than itself
    const own = [...names].filter((name) => !name.startsWith("FLY_"));
    expect(firstCells(table).sort()).toEqual(own.sort());
  });
});

test("README: the codes with which the server closes are there", () => {
  const codes = [...section(readme, "When the server closes a socket").matchAll(/^\| (\d{4})/gm)].map(([, code]) => Number(code));
  const { INTERNAL_ERROR, ...others } = CloseCode; // a bug in the relay is one of "else"
  expect(codes).toEqual(expect.arrayContaining(Object.values(others)));
  expect(codes).not.toContain(INTERNAL_ERROR);
});

test("README: names the Bun version that package.json pins", async () => {
  const { packageManager } = (await Bun.file(new URL("../package.json", import.meta.url)).json()) as {
    packageManager: string;
  };
  const named = [...readme.matchAll(/\bbun@[\d.]+\d/g)].map(([text]) => text);
  expect(named.length).toBeGreaterThan(2);
  expect(new Set(named)).toEqual(new Set([packageManager]));
});

test("clients.md: every refusal has its row", async () => {
  await using relay = testRelay();
  const errors = parseMetrics(await scrape(relay.url)).filter(({ name }) => name === "party_sockets_errors_total");
  const codes = errors.map(({ labels }) => labels.code as string).filter((code) => code !== "internal");
  expect(firstCells(section(await read("ops/clients.md"), "Refusals")).sort()).toEqual(codes.sort());
});

describe("operators.md", () => {
  test("names every cap that the log may say is reached", () => {
    const [, row] = /^\| `cap reached` +\|(.*)$/m.exec(section(operators, "The log")) ?? [];
    expect([...(row ?? "").matchAll(/`([^`]+)`/g)].map(([, cap]) => cap as string)).toEqual(["cap", ...CAPS]);
  });

  test("has every series of /metrics", async () => {
    await using relay = testRelay();
    const names = [...(await scrape(relay.url)).matchAll(/^# TYPE (\S+)/gm)].map(([, name]) => name as string);
    expect(firstCells(section(operators, "Metrics")).sort()).toEqual(names.sort());
  });

  test("says what to do at each alert, and names panels that the dashboard has", async () => {
    const { groups } = Bun.YAML.parse(await read("ops/alerts.yml")) as { groups: { rules: { alert: string }[] }[] };
    const alerts = section(operators, "Alerts");
    expect(firstCells(alerts)).toEqual(groups.flatMap(({ rules }) => rules.map(({ alert }) => alert)));
    const { panels } = (await Bun.file(join(ROOT, "ops/grafana-dashboard.json")).json()) as { panels: { title: string }[] };
    const named = [...alerts.matchAll(/"([^"]+)"/g)].map(([, title]) => title as string);
    expect(named.length).toBeGreaterThan(0);
    expect(panels.map(({ title }) => title)).toEqual(expect.arrayContaining(named));
  });

  test("has a StatefulSet whose variables a relay takes", () => {
    type Variable = { name: string; value?: string; valueFrom?: { fieldRef: { fieldPath: string } } };
    type Pod = { terminationGracePeriodSeconds: number; containers: { env: Variable[] }[] };
    type Resource = {
      kind: string;
      metadata: { name: string };
      spec: { serviceName?: string; replicas?: number; template?: { spec: Pod } };
    };
    const [service, set] = Bun.YAML.parse(blocks(section(operators, "Kubernetes"), "yaml")[0] as string) as [Resource, Resource];
    const { replicas = 0, serviceName, template } = set.spec;
    const { containers, terminationGracePeriodSeconds } = template?.spec as Pod;
    const fields: Record<string, string> = { "metadata.name": `${set.metadata.name}-1`, "status.podIP": "10.1.2.3" };
    const env = Object.fromEntries(
      (containers[0]?.env ?? []).map(({ name, value, valueFrom }) => [
        name,
        value ?? fields[valueFrom?.fieldRef.fieldPath ?? ""],
      ]),
    );
    const { drainSeconds, host } = configFromEnv(env);
    expect({ serviceName, host }).toEqual({ serviceName: service.metadata.name, host: "10.1.2.3" });
    expect(env.PEERS).toBe(Array.from({ length: replicas }, (_, i) => `${set.metadata.name}-${i}`).join());
    expect(env.PEER_ADDRESS).toContain(`{id}.${service.metadata.name}.`);
    expect(terminationGracePeriodSeconds).toBeGreaterThan(drainSeconds);
  });

  test("names the drain that fly.toml has, within what Fly.io allows", async () => {
    const { env, kill_timeout } = Bun.TOML.parse(await read("fly.toml")) as {
      env: { DRAIN_SECONDS: string };
      kill_timeout: string;
    };
    const [drain, kill] = [Number(env.DRAIN_SECONDS), Number.parseInt(kill_timeout)];
    expect(drain).toBeLessThan(kill);
    expect(kill).toBeLessThanOrEqual(300);
    expect(/`DRAIN_SECONDS = (\d+)`/.exec(operators)?.[1]).toBe(`${drain}`);
    expect(/games have (\d+) s to end/.exec(readme)?.[1]).toBe(`${drain}`);
  });
});

describe("links", () => {
  /** The anchors of a page's headings, as GitHub makes them. */
  const anchors = (page: string): string[] =>
    [...page.replace(/^```[\s\S]*?^```$/gm, "").matchAll(/^#+ (.+)$/gm)].map(([, heading]) =>
      (heading as string)
        .toLowerCase()
        .replace(/[^\p{L}\p{N}_ -]/gu, "")
        .replaceAll(" ", "-"),
    );

  test.each(PAGES)("%s: they lead to files and headings that exist", async (path) => {
    const page = await read(path);
    const dead: string[] = [];
    for (const [, link = ""] of page.matchAll(/\]\(([^)\s]+)\)/g)) {
      if (/^https?:/.test(link)) continue;
      const [file = "", anchor] = link.split("#");
      const target = file === "" ? path : join(dirname(path), file);
      if (!(await Bun.file(join(ROOT, target)).exists())) dead.push(link);
      else if (anchor !== undefined && !anchors(await read(target)).includes(anchor)) dead.push(link);
    }
    expect(dead).toEqual([]);
  });

  test.each(PAGES)("%s: names paths and commands that exist", async (path) => {
    const page = await read(path);
    const { scripts } = (await Bun.file(join(ROOT, "package.json")).json()) as { scripts: Record<string, string> };
    const unknown: string[] = [];
    for (const [, named = ""] of page.matchAll(/(?<![\w/.])(ops\/[\w./-]*\w)/g))
      if (!existsSync(join(ROOT, named))) unknown.push(named);
    for (const [, command = ""] of page.matchAll(/\bbun run ([\w:-]+)(?![\w./:-])/g))
      if (!Object.hasOwn(scripts, command)) unknown.push(`bun run ${command}`);
    expect(unknown).toEqual([]);
  });
});
