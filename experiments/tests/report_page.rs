//! The HTML report in a real browser: no console error, the script draws, every control works. Without Chromium the test
//! says so and passes.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::path::{Path, PathBuf};
use std::process::Command;

use marimba_experiments::record::{
    Recorder, RunDir, RunFiles, RunState, RunSummary, run_dir::environment, tags,
};
use marimba_experiments::report::{Options, compare, html, load};

/// Flags that keep a headless browser from the network and from this user's profile.
const FLAGS: [&str; 9] = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
];

/// Uses every control of the page and reports by the page's title.
const EXERCISE: &str = r##"<script>
(() => {
  const bad = [];
  window.addEventListener("error", (e) => bad.push(e.message));
  const want = (what, ok) => { if (!ok) bad.push(what); };
  const all = (s) => [...document.querySelectorAll(s)];
  const lines = () => all("#curve polyline.line").length;
  want("curves drawn by the script", lines() === 5 && document.querySelector("#curve clipPath"));
  const [smooth] = all("#curve-controls input[type=range]");
  const before = all("#curve polyline.line")[0].getAttribute("points");
  smooth.value = 0.9; smooth.dispatchEvent(new Event("input"));
  want("smoothing changes the curve", all("#curve polyline.line")[0].getAttribute("points") !== before);
  for (const box of all("#curve-controls input[type=checkbox]")) { box.click(); want("axes " + lines(), lines() === 5); }
  want("single seeds", all("#curve polyline.seed").length === 10);
  for (const box of all("#curve-controls input[type=checkbox]")) box.click();
  const [metric] = all("#curve-controls select");
  for (const o of [...metric.options]) { metric.value = o.value; metric.dispatchEvent(new Event("change")); want("metric " + o.value, lines() === 5); }
  const chips = all("#legend button");
  chips[0].click(); want("legend hides", lines() === 4 && chips[0].getAttribute("aria-pressed") === "false");
  chips[0].click(); want("legend shows", lines() === 5);
  chips[2].dispatchEvent(new MouseEvent("dblclick")); want("legend isolates", lines() === 1);
  chips.forEach((c) => { if (c.getAttribute("aria-pressed") === "false") c.click(); });
  const chart = document.querySelector("#curve svg"), box = chart.getBoundingClientRect();
  chart.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2, clientY: box.top + 50 }));
  want("read-out", !document.getElementById("tip").hidden && all("#tip tr").length === 5);
  chart.dispatchEvent(new PointerEvent("pointerleave"));
  want("read-out goes", document.getElementById("tip").hidden);
  const names = () => all("#table tbody th").map((t) => t.textContent).join();
  const head = all("#table thead th")[1], ranked = names();
  head.click(); want("sorts up", names() !== ranked); head.click(); want("sorts down", names() === ranked);
  const [cost] = all("#trade-controls select");
  for (const o of [...cost.options]) { cost.value = o.value; cost.dispatchEvent(new Event("change")); want("cost " + o.textContent, all("#scatter circle").length === 5); }
  for (const box of all("#trade-controls input[type=checkbox]")) { box.click(); want("log cost axes", all("#scatter circle").length === 5); box.click(); }
  const kinds = all("#config-controls select")[2];
  want("graphs to compare", kinds && kinds.options.length === 2);
  kinds.value = "graph"; kinds.dispatchEvent(new Event("change"));
  want("graph difference", all("#config-diff .add").length > 0 && document.getElementById("config-diff").textContent.includes("%1"));
  kinds.value = "config"; kinds.dispatchEvent(new Event("change"));
  want("difference", all("#config-diff .add").length > 0 && all("#config-diff .del").length > 0);
  document.getElementById("theme").click(); document.getElementById("theme").click();
  document.title = bad.length ? "FAILED " + bad.join("; ") : "EXERCISED";
})();
</script>"##;

fn chromium() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    ["chromium", "chromium-browser", "google-chrome"]
        .into_iter()
        .flat_map(|name| std::env::split_paths(&path).map(move |dir| dir.join(name)))
        .find(|p| p.is_file())
}

/// Five configurations, two seeds each, in run folders.
fn sweep(dir: &Path) {
    let groups = [
        ("attention", 0.99, 400_000, 0, 2048),
        ("mamba1", 0.25, 398_000, 36_000, 0),
        ("mamba2", 0.61, 401_000, 139_000, 0),
        ("mamba2+attn 1:4", 0.985, 404_000, 104_000, 512),
        ("mamba2+attn 1:4 moe", 0.98, 995_000, 104_000, 512),
    ];
    for (i, (group, accuracy, params, state, kv)) in groups.into_iter().enumerate() {
        for seed in 0..2u64 {
            let name = format!("point{i}-seed{seed}");
            let ron = format!("Run(\n    mixer: \"{group}\",\n    seed: {seed},\n)\n");
            let graph = format!("%0 = embed tokens\n%1 = {group} %0\n");
            let files = RunFiles {
                run_ron: &ron,
                resolved_ron: &ron,
                env: environment([]),
                graph: Some(&graph),
                group,
                seed,
            };
            let mut run = RunDir::create(&dir.join(&name), &files).unwrap();
            let mut recorder = Recorder::create(&run).unwrap();
            let mut last = 0.0;
            for step in (10..=600u64).step_by(10) {
                let x = step as f64 / 100.0 - 0.3 * seed as f64;
                let wave = 0.01 * (step as f64 * (1.0 + seed as f64)).sin();
                last = accuracy / (1.0 + (2.5 + i as f64 * 0.3 - x).exp()) + wave * 0.2;
                recorder
                    .scalar(step, tags::TRAIN_LOSS, 4.0 * (1.0 - last) + wave)
                    .unwrap();
                recorder
                    .scalar(step, &tags::eval("accuracy"), last)
                    .unwrap();
                recorder
                    .scalar(step, &tags::act("layers[0].mixer", "max"), 2.0 + x.abs())
                    .unwrap();
                recorder.flush().unwrap();
            }
            recorder.finish(RunState::Finished).unwrap();
            run.set_status(RunState::Finished, 600, None).unwrap();
            run.set_summary(&RunSummary {
                name,
                group: group.to_owned(),
                seed,
                status: RunState::Finished,
                params_total: params,
                params_active: params.min(448_000),
                state_bytes_per_seq: state,
                kv_bytes_per_token: kv,
                seq_len: 256,
                flops_per_token: 2.2 * params as f64,
                tokens_per_sec: 60_000.0 - 4_000.0 * i as f64,
                final_metrics: [("eval/accuracy".to_owned(), last)].into(),
                best_metrics: [("eval/accuracy".to_owned(), last)].into(),
                config_hash: format!("{i}{seed}"),
                graph_hash: String::new(),
                data_hash: String::new(),
                axes: [("mixer".to_owned(), group.to_owned())].into(),
            })
            .unwrap();
        }
    }
}

#[test]
fn the_report_works_in_a_browser() {
    let tmp = tempfile::tempdir().unwrap();
    sweep(tmp.path());
    let runs = load(&[tmp.path().to_path_buf()]).unwrap();
    let options = Options {
        title: Some("Which mixer recalls?".to_owned()),
        question: Some(
            "Does one attention layer in four suffice for associative recall?".to_owned(),
        ),
        ..Options::default()
    };
    let comparison = compare(&runs, &options);
    assert_eq!((comparison.groups.len(), comparison.members.len()), (5, 10));
    assert_eq!(comparison.metric.as_deref(), Some("eval/accuracy"));
    let out = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let page = out.join("report.html");
    html::write(&page, &comparison, &runs).unwrap();

    let Some(browser) = chromium() else {
        println!("skipped: no chromium, chromium-browser or google-chrome on the PATH");
        return;
    };
    let run = |extra: &[&str], page: &Path| {
        let profile = tempfile::tempdir().unwrap();
        Command::new(&browser)
            .args(FLAGS)
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .args([
                "--enable-logging=stderr",
                "--window-size=1240,2300",
                "--virtual-time-budget=3000",
            ])
            .args(extra)
            .arg(format!("file://{}", page.display()))
            .output()
            .unwrap()
    };
    let picture = out.join("report.png");
    let shot = run(&[&format!("--screenshot={}", picture.display())], &page);
    let log = String::from_utf8_lossy(&shot.stderr);
    assert!(
        !log.contains("CONSOLE"),
        "the page wrote to the console:\n{log}"
    );
    let png = std::fs::read(&picture).unwrap();
    assert!(
        png.starts_with(b"\x89PNG") && png.len() > 50_000,
        "the picture has only {} bytes",
        png.len()
    );

    let exercised = out.join("report-exercised.html");
    let text = std::fs::read_to_string(&page).unwrap();
    std::fs::write(
        &exercised,
        text.replace("</body>", &format!("{EXERCISE}</body>")),
    )
    .unwrap();
    let dump = run(&["--dump-dom"], &exercised);
    let dom = String::from_utf8_lossy(&dump.stdout);
    let title = dom
        .split("<title>")
        .nth(1)
        .and_then(|t| t.split("</title>").next())
        .unwrap_or("no title");
    let log = String::from_utf8_lossy(&dump.stderr);
    assert_eq!(title, "EXERCISED", "\n{log}");
    assert!(
        !log.contains("CONSOLE"),
        "the page wrote to the console:\n{log}"
    );
}
