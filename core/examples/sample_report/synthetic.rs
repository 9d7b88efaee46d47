//! Synthetic runs: the same every time, and close enough to real ones to judge a report by.

use std::f64::consts::TAU;
use std::sync::{Arc, OnceLock};

use memleak_core::finding::Severity;
use memleak_core::history::{Bounds, History};
use memleak_core::output::report::{AlertStatus, AlertView, PluginState, PluginStatus, RuleStatus, RunInfo};
use memleak_core::reachability::roots::Root;
use memleak_core::reachability::verdict::Tally;
use memleak_core::reachability::{SiteVerdict, Verdict};
use memleak_core::snapshot::{
    Cohort, LIFETIME_CLASSES, Losses, Mode, Process, ProcessSample, ReachStep, ReachWay, Site, SiteKey, SiteReach,
    SiteSample, Snapshot, Totals,
};
use memleak_core::symbolize::Frame;

/// Names that must be shown and never obeyed.
pub const HOSTILE_FUNCTION: &str = "</script><script>alert(1)</script><img src=x onerror=\"alert('2')\">";
/// A process name that would clear a terminal, break a line and reverse the rest of it.
pub const HOSTILE_COMM: &str = "\x1b[2J\"'<b>\n\u{202e}exe";

/// Wall-clock time of the start: 2026-03-02 09:30:00 UTC.
const START_WALL_S: f64 = 1_772_443_800.0;
/// Cohorts per site.
const COHORTS: usize = 16;

/// A run as the report gets it.
pub struct Run {
    /// The history.
    pub history: History,
    /// Alerts.
    pub alerts: Vec<AlertView>,
    /// The rest.
    pub info: RunInfo,
}

/// How the outstanding memory of a site develops. Sizes are bytes, times seconds.
#[derive(Clone, Copy)]
enum Shape {
    /// Grows from `from_s` on and never frees that part.
    Leak { from_s: f64, bytes_per_s: f64 },
    /// Fills to `bytes` and stays there, replacing old blocks.
    Cache { bytes: f64, fill_s: f64 },
    /// Blocks come and go; about `bytes` are outstanding.
    Churn { bytes: f64, period_s: f64 },
    /// Allocated at the start and kept.
    Startup { bytes: f64 },
    /// Grows with the load, then shrinks again.
    Load { bytes: f64 },
    /// Fills and is emptied, again and again.
    Sawtooth { bytes: f64, period_s: f64 },
}

impl Shape {
    /// Outstanding and allocated bytes at time `t` of `end`.
    fn at(self, t: f64, end: f64, noise: f64) -> (f64, f64) {
        match self {
            Shape::Leak { from_s, bytes_per_s } => {
                let grown = (t - from_s).max(0.0) * bytes_per_s;
                (grown + 4096.0 * noise, grown * 3.0 + t * 900.0 + 4096.0)
            }
            Shape::Cache { bytes, fill_s } => {
                let full = bytes * (1.0 - (-3.0 * t / fill_s).exp());
                (full * (0.985 + 0.015 * noise), full + bytes * t / fill_s)
            }
            Shape::Churn { bytes, period_s } => {
                (bytes * (0.7 + 0.2 * (TAU * t / period_s).sin() + 0.3 * noise), bytes * (1.0 + t / period_s * 40.0))
            }
            Shape::Startup { bytes } => (bytes, bytes),
            Shape::Load { bytes } => {
                (bytes * (TAU / 2.0 * t / end).sin().max(0.02) + bytes * 0.03 * noise, bytes * (1.0 + t / 20.0))
            }
            Shape::Sawtooth { bytes, period_s } => {
                (bytes * (0.1 + (t % period_s) / period_s), bytes * (1.2 + t / period_s))
            }
        }
    }

    /// What is left of blocks that are `age_s` old, as a fraction.
    fn survival(self, age_s: f64, period_s: f64) -> f64 {
        match self {
            Shape::Leak { .. } => 0.34,
            Shape::Startup { .. } => 1.0,
            Shape::Cache { fill_s, .. } => (-age_s / fill_s).exp(),
            Shape::Load { .. } => (-age_s / 300.0).exp(),
            Shape::Churn { .. } | Shape::Sawtooth { .. } => {
                if age_s < period_s {
                    0.02
                } else {
                    0.0
                }
            }
        }
    }

    /// Lifetimes as number of frees per class around `2^center` microseconds.
    fn lifetimes(self, frees: u64) -> [u64; LIFETIME_CLASSES] {
        let center = match self {
            Shape::Leak { .. } | Shape::Churn { .. } => 11_i32,
            Shape::Cache { .. } | Shape::Load { .. } => 28,
            Shape::Sawtooth { .. } => 25,
            Shape::Startup { .. } => return [0; LIFETIME_CLASSES],
        };
        let mut classes = [0; LIFETIME_CLASSES];
        for (class, n) in (0_i32..).zip(classes.iter_mut()) {
            let distance = f64::from(class - center) / 2.0;
            *n = (frees as f64 * 0.2 * (-distance * distance).exp()) as u64;
        }
        classes
    }
}

/// One site of the plan.
struct Plan {
    site: Arc<Site>,
    shape: Shape,
    block: u64,
}

/// A number from 0 to 1 that looks random and depends on its arguments alone.
fn noise(a: u64, b: u64) -> f64 {
    let mut x = a.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ b.wrapping_mul(0xd1b5_4a32_d192_ed03);
    x ^= x >> 32;
    x = x.wrapping_mul(0x9fb2_1c65_1e98_df25);
    x ^= x >> 29;
    (x >> 11) as f64 / (1_u64 << 53) as f64
}

fn process(instance: u32, pid: u32, comm: &str, exe: &str) -> Arc<Process> {
    Arc::new(Process {
        instance,
        pid,
        start_ticks: 1,
        comm: comm.into(),
        exe: exe.into(),
        cmdline: format!("{exe} --config /etc/app.toml"),
        labels: memleak_core::labels::Labels::from_cgroup(&format!("/system.slice/{comm}.service")),
    })
}

/// A frame with a source line: `function @ file:line`; `~` in front means inlined, `?module` has no name.
fn frame(text: &str, module: &str, number: u64) -> Frame {
    let address = 0x5555_5555_0000 + number * 0x140;
    let build_id = Some("4fd2a0c91b7e".to_owned());
    if let Some(module) = text.strip_prefix('?') {
        return Frame {
            module: Some(module.into()),
            offset: 0x1f40 + number * 0x33,
            reason: Some("the file has no symbols".into()),
            address,
            build_id,
            ..Frame::default()
        };
    }
    let (inlined, text) = text.strip_prefix('~').map_or((false, text), |t| (true, t));
    let (function, place) = text.split_once(" @ ").map_or((text, None), |(f, p)| (f, Some(p)));
    let place = place.and_then(|p| p.rsplit_once(':'));
    Frame {
        function: Some(function.into()),
        module: Some(module.into()),
        offset: 0x1a + number * 7 % 0x300,
        file: place.map(|(file, _)| file.into()),
        line: place.and_then(|(_, line)| line.parse().ok()),
        inlined,
        reason: None,
        address,
        build_id,
        file_address: Some(0x2000 + number * 0x140),
    }
}

fn site(process: &Arc<Process>, number: u64, function: &str, frames: Vec<Frame>, truncated: Option<&str>) -> Arc<Site> {
    Arc::new(Site {
        key: SiteKey { instance: process.instance, probe_set: 1, stack: number },
        id: number.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        process: Arc::clone(process),
        probe_set: "glibc".into(),
        function: function.into(),
        addresses: frames.iter().map(|f| f.address).collect(),
        truncated: truncated.map(Into::into),
        first_thread: None,
        frames: OnceLock::from(frames),
    })
}

impl Plan {
    fn sample(&self, t: f64, end: f64, number: u64, last: bool) -> SiteSample {
        let (outstanding, allocated) = self.shape.at(t, end, noise(self.site.key.stack, number));
        let count = (outstanding / self.block as f64).max(0.0) as u64;
        let allocated_count = ((allocated / self.block as f64) as u64).max(count);
        let freed_count = allocated_count - count;
        let totals = Totals {
            allocated_bytes: allocated_count * self.block,
            allocated_count,
            freed_bytes: freed_count * self.block,
            freed_count,
        };
        let last_allocation_s = match self.shape {
            Shape::Startup { .. } => 2.0,
            _ => t - noise(self.site.key.stack, 1) * 3.0,
        };
        SiteSample {
            site: Arc::clone(&self.site),
            totals,
            stderr: Default::default(),
            last_allocation_s,
            // Only the newest state of a site is kept, so only the last snapshot needs these.
            cohorts: if last { self.cohorts(t, end, totals) } else { Vec::new() },
            lifetimes: if last { self.shape.lifetimes(freed_count) } else { [0; LIFETIME_CLASSES] },
            reachability: if last { self.reach(t, totals).map(Arc::new) } else { None },
            kernel: None,
        }
    }

    /// What scans would say: leaks are lost but for a few blocks, caches hang on a variable.
    fn reach(&self, t: f64, totals: Totals) -> Option<SiteReach> {
        let of = |blocks: u64| Tally { blocks, bytes: blocks * self.block };
        let count = totals.outstanding_count();
        let (verdict, counts, name) = match self.shape {
            Shape::Leak { .. } => {
                let reachable = of(count / 40);
                let lost = of(count - reachable.blocks - count / 5);
                let counts = SiteVerdict { lost, reachable, indirectly_lost: of(count / 5), ..SiteVerdict::default() };
                (Verdict::Definite, counts, "recent_sessions")
            }
            Shape::Cache { .. } | Shape::Load { .. } => {
                (Verdict::Reachable, SiteVerdict { reachable: of(count), ..SiteVerdict::default() }, "catalog::cache")
            }
            Shape::Sawtooth { .. } => {
                let counts = SiteVerdict { possible: of(count), ..SiteVerdict::default() };
                (Verdict::Possible, counts, "")
            }
            _ => return None,
        };
        let module = self.site.process.exe.clone();
        let steps = vec![ReachStep::Blocks(Arc::clone(&self.site), 212)];
        let root = Root::Global { module, name: Some(name.to_owned()), offset: 0x40 };
        let way = (counts.reachable.blocks > 0).then_some(ReachWay { root, steps });
        Some(SiteReach { verdict, counts: SiteVerdict { scans: 3, ..counts }, time_s: t - 40.0, way })
    }

    fn cohorts(&self, t: f64, end: f64, totals: Totals) -> Vec<Cohort> {
        let period = t / COHORTS as f64;
        let allocated = |at: f64| self.shape.at(at, end, 0.5).1;
        let mut left = totals.outstanding_count();
        let mut cohorts: Vec<Cohort> = (0..COHORTS)
            .map(|i| {
                let (start_s, end_s) = (i as f64 * period, (i + 1) as f64 * period);
                let from = if i == 0 { 0.0 } else { allocated(start_s) };
                let born_count = ((allocated(end_s) - from).max(0.0) / self.block as f64) as u64;
                let survivors = (born_count as f64 * self.shape.survival(t - end_s, period)) as u64;
                let outstanding_count = survivors.min(left);
                left -= outstanding_count;
                Cohort {
                    start_s,
                    end_s,
                    born_count,
                    born_bytes: born_count * self.block,
                    outstanding_count,
                    outstanding_bytes: outstanding_count * self.block,
                }
            })
            .collect();
        // What the model leaves over is young.
        if let Some(newest) = cohorts.last_mut() {
            newest.outstanding_count += left;
            newest.outstanding_bytes += left * self.block;
            newest.born_count = newest.born_count.max(newest.outstanding_count);
            newest.born_bytes = newest.born_count * self.block;
        }
        cohorts
    }
}

fn history(plans: &[Plan], processes: &[ProcessSample], snapshots: u32, interval_s: f64) -> History {
    let mut history = History::new(Bounds { samples: 500, points: 2_000_000 });
    let end = f64::from(snapshots) * interval_s;
    for number in 1..=snapshots {
        let t = f64::from(number) * interval_s;
        let last = number == snapshots;
        let processes = (processes.iter()).map(|p| ProcessSample { alive: p.alive || !last, ..p.clone() }).collect();
        history.push(&Snapshot {
            number: number.into(),
            time_s: t,
            wall_s: START_WALL_S + t,
            processes,
            sites: plans.iter().map(|p| p.sample(t, end, number.into(), last)).collect(),
            collect_cpu_s: 0.002,
        });
    }
    history
}

fn process_sample(process: &Arc<Process>, rss: u64, losses: Losses) -> ProcessSample {
    ProcessSample {
        process: Arc::clone(process),
        alive: true,
        mode: Mode::Exact,
        hits: 4_812_334 / u64::from(process.instance),
        unmatched_frees: 1_204,
        losses,
        rss_bytes: Some(rss),
        cpu_s: Some(412.0),
        overhead_s: 9.4 / f64::from(process.instance),
        ..ProcessSample::default()
    }
}

fn info(title: &str) -> RunInfo {
    let rule =
        |name: &str, description: &str| RuleStatus { name: name.into(), description: description.into(), error: None };
    let plugin = |probe_set: &str, target: &str, state, probes, detail: &str| PluginStatus {
        probe_set: probe_set.into(),
        target: target.into(),
        state,
        probes,
        detail: detail.into(),
    };
    RunInfo {
        title: title.into(),
        version: env!("CARGO_PKG_VERSION").into(),
        host: "prod-eu-7".into(),
        kernel: "6.12.57-amd64".into(),
        started_wall_s: START_WALL_S,
        targets: vec!["name shop-api".into(), "exe /usr/bin/redis-*".into()],
        interval_s: 5.0,
        backend: "session".into(),
        rules: vec![
            rule("growth", "outstanding bytes rise in every snapshot and do not level off"),
            rule("slow_growth", "a small slope that is significant over the whole run"),
            rule("survival", "blocks survive far longer than others of the same site"),
            rule("threshold", "outstanding bytes or blocks above a fixed bound"),
            RuleStatus {
                name: "team_pool".into(),
                description: "pools of the payment service".into(),
                error: Some("rules/team_pool.lua:12: attempt to index a nil value (field 'pool')".into()),
            },
        ],
        plugins: vec![
            plugin("glibc", "4711 shop-api", PluginState::Attached, 18, "/usr/lib/x86_64-linux-gnu/libc.so.6"),
            plugin("glibc", "812 redis-server", PluginState::Attached, 18, "/usr/lib/x86_64-linux-gnu/libc.so.6"),
            plugin("musl", "4711 shop-api", PluginState::Skipped, 0, "the process does not map it"),
            plugin(
                "jemalloc",
                "812 redis-server",
                PluginState::Failed,
                0,
                "symbol `je_malloc` is not in /usr/lib/libjemalloc.so.2",
            ),
        ],
        budget: Some("Budget 5 % of the targets' CPU time: kept, 2.3 % used".into()),
        own_cpu_s: Some(3.4),
        own_rss_bytes: Some(46 << 20),
        own_map_bytes: Some(28 << 20),
        own_snapshot_cpu_s: Some(0.002),
        report_path: Some("memleak-report.html".into()),
        alerts_path: Some("memleak-alerts.ndjson".into()),
        gaps: Vec::new(),
    }
}

/// Half an hour of a shop's server beside a redis: a leak, a slow leak, a cache, churn, hostile names.
pub fn realistic() -> Run {
    let api = process(1, 4711, "shop-api", "/opt/shop/bin/shop-api");
    let redis = process(2, 812, "redis-server", "/usr/bin/redis-server");
    let hostile = process(3, 6660, HOSTILE_COMM, "/tmp/\"><svg onload=alert(3)>/a\nb");
    let worker = process(4, 5120, "shop-report", "/opt/shop/bin/shop-report");
    let exe = "/opt/shop/bin/shop-api";
    let cxx = "/usr/lib/x86_64-linux-gnu/libstdc++.so.6.0.30";
    let mut plans = Vec::new();
    let mut add =
        |process: &Arc<Process>, function: &str, shape, block, stack: &[(&str, &str)], truncated: Option<&str>| {
            let number = plans.len() as u64 + 1;
            let frames =
                stack.iter().zip(0..).map(|((text, module), i)| frame(text, module, number * 40 + i)).collect();
            plans.push(Plan { site: site(process, number, function, frames, truncated), shape, block });
        };
    let serve: [(&str, &str); 4] = [
        ("http::Connection::on_readable() @ src/http/connection.cc:231", exe),
        ("net::Loop::run_once(std::chrono::milliseconds) @ src/net/loop.cc:118", exe),
        ("main @ src/main.cc:64", exe),
        ("__libc_start_main", "/usr/lib/x86_64-linux-gnu/libc.so.6"),
    ];
    let with = |head: &[(&'static str, &'static str)]| [head, &serve[..]].concat();
    add(
        &api,
        "malloc",
        Shape::Leak { from_s: 240.0, bytes_per_s: 5_400.0 },
        351,
        &with(&[
            ("operator new(unsigned long)", cxx),
            ("~std::make_shared<session::Session>(std::string&&) @ /usr/include/c++/12/bits/shared_ptr.h:1008", exe),
            ("session::Store::open_session(http::Request const&) @ src/session/store.cc:87", exe),
            ("auth::Handler::login(http::Request const&) @ src/auth/handler.cc:142", exe),
        ]),
        None,
    );
    add(
        &api,
        "realloc",
        Shape::Leak { from_s: 0.0, bytes_per_s: 131.0 },
        72,
        &with(&[
            ("log::Ring::append(std::string_view) @ src/log/ring.cc:55", exe),
            ("metrics::Registry::label_set(std::vector<Label> const&) @ src/metrics/registry.cc:203", exe),
        ]),
        None,
    );
    add(
        &api,
        "malloc",
        Shape::Cache { bytes: 6.4e6, fill_s: 420.0 },
        4_160,
        &with(&[
            ("operator new(unsigned long)", cxx),
            ("~std::list<catalog::Entry>::emplace_front<>() @ /usr/include/c++/12/bits/stl_list.h:1230", exe),
            ("catalog::LruCache::put(Key const&, Page&&) @ src/catalog/lru.cc:40", exe),
        ]),
        None,
    );
    add(
        &api,
        "malloc",
        Shape::Churn { bytes: 1.4e6, period_s: 90.0 },
        16_384,
        &with(&[("http::Buffer::grow(unsigned long) @ src/http/buffer.cc:19", exe)]),
        None,
    );
    add(
        &api,
        "calloc",
        Shape::Startup { bytes: 2.1e6 },
        65_536,
        &[
            ("net::ThreadPool::ThreadPool(unsigned int) @ src/net/thread_pool.cc:22", exe),
            ("main @ src/main.cc:31", exe),
        ],
        None,
    );
    add(
        &api,
        "malloc",
        Shape::Load { bytes: 3.0e6 },
        2_048,
        &with(&[("cart::Cart::add(Item const&) @ src/cart/cart.cc:71", exe)]),
        None,
    );
    add(
        &api,
        "malloc",
        Shape::Sawtooth { bytes: 9.0e5, period_s: 300.0 },
        512,
        &with(&[("batch::Queue::push(Order) @ src/batch/queue.cc:33", exe)]),
        None,
    );
    add(
        &api,
        "malloc",
        Shape::Churn { bytes: 8.1e5, period_s: 60.0 },
        96,
        &[("?/opt/vendor/libpayments.so.3", ""), ("?/opt/vendor/libpayments.so.3", "")],
        Some("no unwind information for /opt/vendor/libpayments.so.3"),
    );
    let server = "/usr/bin/redis-server";
    for (i, (name, shape, block)) in [
        ("sdsnewlen @ sds.c:113", Shape::Cache { bytes: 3.3e6, fill_s: 300.0 }, 96),
        ("dictExpand @ dict.c:225", Shape::Sawtooth { bytes: 4.2e5, period_s: 600.0 }, 8_192),
        ("createClient @ networking.c:131", Shape::Churn { bytes: 2.9e5, period_s: 45.0 }, 17_408),
        ("aofRewriteBufferAppend @ aof.c:122", Shape::Leak { from_s: 900.0, bytes_per_s: 260.0 }, 1_040),
    ]
    .into_iter()
    .enumerate()
    {
        let caller = [
            "setCommand @ t_string.c:301",
            "dbAdd @ db.c:190",
            "acceptTcpHandler @ networking.c:1201",
            "propagate @ server.c:3120",
        ][i];
        add(
            &redis,
            "malloc",
            shape,
            block,
            &[
                ("zmalloc @ zmalloc.c:112", server),
                (name, server),
                (caller, server),
                ("aeMain @ ae.c:500", server),
                ("main @ server.c:6980", server),
            ],
            None,
        );
    }
    add(
        &hostile,
        "malloc",
        Shape::Churn { bytes: 3.2e5, period_s: 70.0 },
        61,
        &[
            (HOSTILE_FUNCTION, "/tmp/\"><svg onload=alert(3)>/a\nb"),
            ("evil\u{202e}gnp.niam\u{2066}() @ /tmp/<i>\r\n.c:1", "/tmp/x\x1b]0;owned\x07"),
        ],
        Some("the frame pointer points outside of the stack"),
    );
    add(
        &worker,
        "malloc",
        Shape::Load { bytes: 8.0e5 },
        333,
        &[
            ("report::render(Template const&) @ src/report/render.cc:88", "/opt/shop/bin/shop-report"),
            ("main @ src/report/main.cc:20", "/opt/shop/bin/shop-report"),
        ],
        None,
    );
    for i in 0..120_u64 {
        let size = 256.0 * 1.6_f64.powf(noise(i, 7) * 14.0);
        let shape = match i % 5 {
            0 => Shape::Startup { bytes: size },
            1 => Shape::Cache { bytes: size, fill_s: 200.0 + 600.0 * noise(i, 9) },
            2 => Shape::Sawtooth { bytes: size, period_s: 60.0 + 400.0 * noise(i, 8) },
            _ => Shape::Churn { bytes: size, period_s: 20.0 + 90.0 * noise(i, 6) },
        };
        let module = ["catalog", "cart", "auth", "pricing", "search", "json"][(i % 6) as usize];
        let name = format!("{module}::detail::Node{}::clone(Arena&) @ src/{module}/node_{i}.cc:{}", i % 11, 20 + i * 3);
        let stack = [&[("operator new(unsigned long)", cxx), (name.as_str(), exe)], &serve[..]].concat();
        add(&api, "malloc", shape, 16 + 8 * (i % 40), &stack, None);
    }
    let losses = Losses { missed_returns: 31, implicit_frees: 4, ..Losses::default() };
    let processes = [
        process_sample(&api, 148 << 20, losses),
        process_sample(&redis, 21 << 20, Losses::default()),
        process_sample(&hostile, 4 << 20, Losses::default()),
        ProcessSample { alive: false, rss_bytes: None, ..process_sample(&worker, 0, Losses::default()) },
    ];
    let alert = |i: usize, status, rule: &str, severity, confidence, since_s, reason: &str| AlertView {
        id: format!("{:016x}", (i as u64 + rule.len() as u64).wrapping_mul(0xa076_1d64_78bd_642f)),
        status,
        since_s,
        rule: rule.into(),
        severity,
        confidence,
        reason: reason.into(),
        site: plans[i].site.key,
        processes: 1,
    };
    let alerts = vec![
        alert(
            0,
            AlertStatus::Firing,
            "growth",
            Severity::Critical,
            0.97,
            320.0,
            "grew in all of the last 296 snapshots, 5.3 KiB/s, and does not level off",
        ),
        alert(
            0,
            AlertStatus::Firing,
            "survival",
            Severity::Warning,
            0.91,
            610.0,
            "34 % of the blocks outlive every freed block of the site by more than 100 times",
        ),
        alert(
            1,
            AlertStatus::Firing,
            "slow_growth",
            Severity::Warning,
            0.88,
            900.0,
            "131 B/s over 30 minutes, significant at 99.9 %",
        ),
        alert(
            11,
            AlertStatus::Firing,
            "slow_growth",
            Severity::Info,
            0.52,
            1_500.0,
            "260 B/s since 15 minutes; too short to be sure",
        ),
        alert(6, AlertStatus::Resolved, "threshold", Severity::Warning, 0.8, 700.0, "more than 900 KiB outstanding"),
    ];
    let history = history(&plans, &processes, 360, 5.0);
    Run { history, alerts, info: info("shop-api and redis-server on prod-eu-7") }
}

/// A run of many sites with deep stacks that share most of their frames, all of them moving.
pub fn large(sites: u64, snapshots: u32) -> Run {
    let server = process(1, 4711, "big-server", "/opt/big/bin/server");
    let exe = "/opt/big/bin/server";
    let plans: Vec<Plan> = (0..sites)
        .map(|i| {
            let frames = (0..24_u64)
                .map(|depth| {
                    // Towards the root fewer and fewer different frames.
                    let n = i >> (depth / 2);
                    let text = format!(
                        "app::module_{}::Handler<std::basic_string<char>>::step_{depth}_{n}(Request const&) @ src/module_{}/step_{depth}.cc:{}",
                        n % 40, n % 40, 10 + n % 900
                    );
                    frame(&text, exe, n * 24 + depth)
                })
                .collect();
            let bytes = 4096.0 * (1.0 + 200.0 * noise(i, 3));
            let shape = match i % 10 {
                0 => Shape::Leak { from_s: 50.0 * noise(i, 5), bytes_per_s: 400.0 * noise(i, 4) + 20.0 },
                1..=3 => Shape::Cache { bytes, fill_s: 100.0 + 300.0 * noise(i, 2) },
                4 => Shape::Sawtooth { bytes, period_s: 40.0 + 60.0 * noise(i, 2) },
                _ => Shape::Churn { bytes, period_s: 10.0 + 60.0 * noise(i, 2) },
            };
            let number = i + 1;
            Plan { site: site(&server, number, "malloc", frames, None), shape, block: 24 + 8 * (i % 60) }
        })
        .collect();
    let alerts = (plans.iter().take(40).enumerate().filter(|(i, _)| i % 10 == 0))
        .map(|(i, p)| AlertView {
            id: format!("{i:016x}"),
            status: AlertStatus::Firing,
            since_s: 60.0,
            rule: "growth".into(),
            severity: Severity::Warning,
            confidence: 0.9,
            reason: "grew in all snapshots".into(),
            site: p.site.key,
            processes: 1,
        })
        .collect();
    let history = history(&plans, &[process_sample(&server, 2 << 30, Losses::default())], snapshots, 1.0);
    Run { history, alerts, info: info("big-server") }
}
