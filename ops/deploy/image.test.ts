/** The Dockerfile, read: what is wrong with it before anything is built. `image.real.ts` builds and runs it. */
import { describe, expect, test } from "bun:test";
import { join } from "node:path";
import { packageManager, version } from "../../package.json" with { type: "json" };
import { LIMITS } from "../../server.ts";

const context = join(import.meta.dir, "../..");
const DOCKER_STOP_SECONDS = 10; // then `docker stop` kills

const dockerfile = await Bun.file(join(context, "Dockerfile")).text();
const dockerignore = await Bun.file(join(context, ".dockerignore")).text();

/** What the relay loads: `server.ts`, and what it imports from here. */
async function loadedFiles(name = "server.ts"): Promise<string[]> {
  if (!name.endsWith(".ts")) return [name];
  const imports = new Bun.Transpiler({ loader: "ts" }).scanImports(await Bun.file(join(context, name)).text());
  const here = imports.filter(({ path }) => path.startsWith("./")).map(({ path }) => loadedFiles(path.slice(2)));
  return [name, ...(await Promise.all(here)).flat()].toSorted();
}

describe("the image", () => {
  test("is built from the Bun that package.json pins, by a tag that doesn't move", () => {
    expect(dockerfile.match(/^FROM .*/gm)).toEqual([`FROM oven/${packageManager.replace("@", ":")}-slim`]);
  });

  test("is labelled with the version of package.json", () => {
    expect(dockerfile).toContain(`org.opencontainers.image.version="${version}"`);
  });

  test("takes the files that the relay loads, and its build sees no others", async () => {
    const needed = await loadedFiles();
    expect(needed).toContain("regions.ts");
    expect(/^COPY (.*) \.\/$/m.exec(dockerfile)?.[1]?.split(" ").toSorted()).toEqual(needed);
    const patterns = dockerignore.split("\n").filter((line) => line !== "" && !line.startsWith("#"));
    expect(patterns).toEqual(["*", ...needed.map((name) => `!${name}`)]);
  });

  test("drains within what docker stop gives, with a second to spare for its close frames", () => {
    expect(LIMITS.drainSeconds + 1).toBeLessThan(DOCKER_STOP_SECONDS);
  });
});
