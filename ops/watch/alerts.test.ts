/** The alert rules, as Prometheus' own tool judges them. */
import { describe, expect, test } from "bun:test";

const promtool = Bun.which("promtool");

/** Runs promtool in this directory. */
function run(...args: string[]): { exitCode: number; says: string } {
  const { exitCode, stdout, stderr } = Bun.spawnSync(["promtool", ...args], { cwd: import.meta.dir });
  return { exitCode, says: `${stdout}${stderr}` };
}

describe.skipIf(promtool === null)("alerts (need promtool of Debian's prometheus)", () => {
  test("are rules that Prometheus takes", () => {
    expect(run("check", "rules", "../alerts.yml")).toEqual({
      exitCode: 0,
      says: expect.stringContaining("SUCCESS"),
    });
  });

  test("sound when players suffer, and keep quiet when they don't", () => {
    expect(run("test", "rules", "alerts.test.yml")).toEqual({
      exitCode: 0,
      says: expect.stringContaining("SUCCESS"),
    });
  });
});

test("each alert has a case in which it sounds", async () => {
  const read = async (name: string) => Bun.YAML.parse(await Bun.file(`${import.meta.dir}/${name}`).text());
  const { groups } = (await read("../alerts.yml")) as { groups: { rules: { alert: string }[] }[] };
  const { tests } = (await read("alerts.test.yml")) as {
    tests: { alert_rule_test: { alertname: string; exp_alerts?: object[] }[] }[];
  };
  const sounding = tests
    .flatMap((one) => one.alert_rule_test)
    .filter(({ exp_alerts }) => exp_alerts !== undefined)
    .map(({ alertname }) => alertname);
  const alerts = groups.flatMap((group) => group.rules).map(({ alert }) => alert);
  expect([...new Set(sounding)].toSorted()).toEqual(alerts.toSorted());
});
