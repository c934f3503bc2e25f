/** The Grafana dashboard's queries, put to a real Prometheus. It takes 5 s until it scrapes for the first time. */
import { expect, test } from "bun:test";
import { whyNoPrometheus } from "../shared/prometheus.ts";
import { evaluate, type Panel, readDashboard, startPrometheus } from "./dashboard.ts";

const dashboard = await readDashboard();

test.skipIf(whyNoPrometheus !== undefined)(
  `every query gives numbers, whoever set the labels instance and region${whyNoPrometheus ?? ""}`,
  async () => {
    await using prometheus = await startPrometheus();
    const answers = await evaluate(dashboard, prometheus);
    expect(answers.filter(({ error }) => error !== undefined)).toEqual([]);
    expect(Object.keys(prometheus.labellings)).toHaveLength(3);
    const asked = new Set(answers.map(({ where }) => where));
    for (const { title, type } of dashboard.panels) if (type !== "row") expect(asked).toContain(title);

    const players = answers.filter(({ where }) => where === "Players by region");
    for (const { series, labelling } of players) {
      const byRegion = series.map(({ labels, points }) => [labels.region, Math.min(...points.map(([, value]) => value))]);
      const [ams, fra] = prometheus.labellings[labelling]?.region ?? [];
      expect({ labelling, byRegion }).toEqual({
        labelling,
        byRegion: [
          [ams, 12],
          [fra, 5],
        ],
      });
    }

    const broken = structuredClone(dashboard);
    const panel = broken.panels.find(({ title }) => title === "Memory") as Panel;
    broken.panels = [panel];
    panel.targets = [
      { refId: "A", expr: 'party_sockets_nonsense{region=~"$region"}' },
      { refId: "B", expr: "sum(party_sockets_rooms{" },
      { refId: "C", expr: "0 * party_sockets_rooms / 0" },
    ];
    const wrong = await evaluate({ ...broken, templating: { list: [] }, annotations: { list: [] } }, prometheus);
    const errorsOf = (refId: string) => new Set(wrong.filter(({ target }) => target?.refId === refId).map(({ error }) => error));
    expect(errorsOf("A")).toEqual(new Set(["an empty answer"]));
    expect(errorsOf("B")).toEqual(new Set([expect.stringContaining("parse error")]));
    expect(errorsOf("C")).toEqual(new Set(["an empty answer"]));
  },
  30_000,
);
