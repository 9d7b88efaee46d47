//! Scans of watched processes in the background.
//!
//! The collector asks for a scan and takes results; the scan itself runs in a thread of its own, since it takes seconds
//! and windows must be opened and closed meanwhile. What earlier scans have taught of a process goes into the next one
//! and comes back with its result.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use memleak_probes::BlockReader;

use super::mark::{Learned, Reach, Referrer};
use super::memory::{Memory as _, Pagemap, ProcessMemory, Range, Ranges};
use super::roots::{Root, RootNames};
use super::scanner::{self, Cost, Options, Scanned, Tempo};
use super::verdict::{Ledger, Limits, SiteVerdict};
use super::{Block, runtime};
use crate::error::{Error, ErrorKind, Result};
use crate::maps::Maps;
use crate::process::ProcDir;
use crate::snapshot::SiteKey;

/// Blocks of a site whose way to a root is looked at.
const EXAMPLES: usize = 8;
/// Blocks of a site that a root refers to directly and that are looked at, for one that a variable refers to.
const DIRECT: usize = 64;
/// Bytes read at once in the search for what refers to a new block.
const CHUNK: usize = 1 << 20;
/// Longest way that is followed, in references.
const MAX_CHAIN: usize = 100_000;
/// Most links of a way that are kept, at each end.
const KEPT_LINKS: usize = 4;
/// Outstanding blocks that are read between two rests.
const READ: u32 = 4096;

/// What to scan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    /// Instance number.
    pub instance: u32,
    /// Process id.
    pub pid: u32,
    /// Start time in clock ticks after boot: with the pid it names the process.
    pub start_ticks: u64,
    /// Numbers of the probe sets whose blocks are glibc's.
    pub glibc: Vec<u32>,
    /// Sites that come first when there are too many blocks.
    pub suspects: Vec<SiteKey>,
}

/// One step on the way from a root to a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// So many blocks of a site, each referring to the next.
    Blocks(SiteKey, usize),
    /// So many references that are not shown.
    Skipped(usize),
}

/// Why a block is reachable: the root, and the blocks on the way from it, outermost first; the block itself is left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Way {
    /// Where the way begins.
    pub root: Root,
    /// What lies between.
    pub steps: Vec<Step>,
}

/// What a series of scans says of one process.
#[derive(Debug)]
pub struct Outcome {
    /// Each site with blocks.
    pub sites: Vec<(SiteKey, SiteVerdict, Option<Way>)>,
    /// What it took.
    pub cost: Cost,
    /// When a loss is definite.
    pub limits: Limits,
}

/// What is kept of a process between scans.
#[derive(Debug, Default)]
struct Memory {
    /// Numbers of sites; they must mean the same in every scan.
    numbers: HashMap<(u32, u64), u32>,
    keys: Vec<SiteKey>,
    learned: Learned,
    ledger: Ledger,
}

impl Memory {
    fn number(&mut self, key: SiteKey) -> u32 {
        let keys = &mut self.keys;
        *self.numbers.entry((key.probe_set, key.stack)).or_insert_with(|| {
            keys.push(key);
            (keys.len() - 1) as u32
        })
    }
}

struct Job {
    thread: JoinHandle<(Memory, Result<Outcome>)>,
    over: Arc<AtomicBool>,
}

/// Runs scans, at most one per process at a time. A scan under way is given up when this is dropped.
#[derive(Default)]
pub struct Service {
    jobs: HashMap<u32, Job>,
    memories: HashMap<u32, Memory>,
}

impl Service {
    /// Starts a scan, unless one of the process is under way.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start(&mut self, subject: Subject, reader: BlockReader, options: Options) -> Result<()> {
        if self.jobs.contains_key(&subject.instance) {
            return Ok(());
        }
        let mut memory = self.memories.remove(&subject.instance).unwrap_or_default();
        let over = Arc::new(AtomicBool::new(false));
        let theirs = Arc::clone(&over);
        let instance = subject.instance;
        let work = move || {
            let outcome = work(&subject, &reader, &options, &mut memory, &theirs);
            (memory, outcome)
        };
        let thread = std::thread::Builder::new().name("memleak-scan".to_owned()).spawn(work);
        let thread = thread.map_err(|e| Error::io("failed to start a thread for a scan", e))?;
        self.jobs.insert(instance, Job { thread, over });
        Ok(())
    }

    /// Whether a scan of an instance is under way.
    pub fn is_running(&self, instance: u32) -> bool {
        self.jobs.contains_key(&instance)
    }

    /// Gives a scan that is under way up; its result says so.
    pub fn cancel(&mut self, instance: u32) {
        if let Some(job) = self.jobs.get(&instance) {
            job.over.store(true, Ordering::Relaxed);
        }
    }

    /// Whether any scan is under way.
    pub fn is_busy(&self) -> bool {
        !self.jobs.is_empty()
    }

    /// Results of scans that have ended since the last call, by instance.
    pub fn take_finished(&mut self) -> Vec<(u32, Result<Outcome>)> {
        let done: Vec<u32> = self.jobs.iter().filter(|(_, j)| j.thread.is_finished()).map(|(i, _)| *i).collect();
        let mut finished = Vec::new();
        for instance in done {
            let Some(job) = self.jobs.remove(&instance) else { continue };
            let (memory, outcome) = job.thread.join().unwrap_or_else(|_| {
                (Memory::default(), Err(Error::new(ErrorKind::Kernel, "failed to scan: the scan panicked")))
            });
            self.memories.insert(instance, memory);
            finished.push((instance, outcome));
        }
        finished
    }

    /// Looks whether blocks that were called lost have been freed since. Says so in the verdicts of their sites.
    pub fn check_ledger(&mut self, instance: u32, reader: &BlockReader, apply: &mut dyn FnMut(SiteKey, u64, u64)) {
        let Some(memory) = self.memories.get_mut(&instance) else { return };
        memory.ledger.check(|address, birth_ns| reader.is_outstanding(instance, address, birth_ns));
        for (site, called, refuted) in memory.ledger.counts() {
            if let Some(key) = memory.keys.get(site as usize) {
                apply(*key, called, refuted);
            }
        }
    }

    /// Forgets a process that has ended.
    pub fn forget(&mut self, instance: u32) {
        self.memories.remove(&instance);
        if let Some(job) = self.jobs.remove(&instance) {
            job.over.store(true, Ordering::Relaxed);
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        for (_, job) in self.jobs.drain() {
            job.over.store(true, Ordering::Relaxed);
            let _ = job.thread.join();
        }
    }
}

fn work(
    subject: &Subject,
    reader: &BlockReader,
    options: &Options,
    memory: &mut Memory,
    over: &AtomicBool,
) -> Result<Outcome> {
    let dir = ProcDir::open_same(subject.pid, subject.start_ticks)?;
    if let Some(runtime) = runtime::moving_collector(&dir) {
        return Err(runtime::refused(subject.pid, runtime));
    }
    let mut learned = std::mem::take(&mut memory.learned);
    let suspects: HashSet<(u32, u64)> = subject.suspects.iter().map(|key| (key.probe_set, key.stack)).collect();
    let mut suspects_only = false;
    let blocks = |tempo: &mut Tempo<'_>| {
        let (mut blocks, mut seen, mut over) = (Vec::new(), 0_u32, Ok(()));
        let mut newest: Option<(u32, u64, u32)> = None;
        reader.for_each(subject.instance, |b| {
            seen = seen.wrapping_add(1);
            if over.is_ok() && seen.is_multiple_of(READ) {
                over = tempo.go_on();
            }
            if over.is_err() {
                return;
            }
            let of_suspect = |probe_set, stack| suspects.contains(&(probe_set, stack));
            if blocks.len() == options.max_blocks && !suspects_only && !suspects.is_empty() {
                suspects_only = true;
                let of_suspects =
                    |b: &Block| memory.keys.get(b.site as usize).is_some_and(|k| of_suspect(k.probe_set, k.stack));
                blocks.retain(of_suspects);
            }
            if suspects_only && !of_suspect(b.probe_set, b.stack) {
                return;
            }
            // Looked up again only when it is another one.
            let site = match newest {
                Some((probe_set, stack, site)) if (probe_set, stack) == (b.probe_set, b.stack) => site,
                _ => memory.number(SiteKey { instance: subject.instance, probe_set: b.probe_set, stack: b.stack }),
            };
            newest = Some((b.probe_set, b.stack, site));
            let glibc = subject.glibc.contains(&b.probe_set);
            blocks.push(Block { address: b.address, size: b.size, birth_ns: b.birth_ns, site, glibc });
        })?;
        over.map(|()| blocks)
    };
    let is_over = || over.load(Ordering::Relaxed);
    let scanned = scanner::scan(&dir, options, &mut learned, blocks, &is_over);
    memory.learned = learned;
    let mut scanned = scanned?;
    scanned.cost.suspects_only = suspects_only;
    let cpu = scanner::thread_cpu();
    let mut tempo = Tempo::new(options, &is_over);
    let verdicts = scanned.verdicts(&mut tempo)?;
    let mut lost = scanned.series.lost_names(&scanned.index, &scanned.marked, &scanned.gone);
    // Those that turned out to be hidden were not called lost.
    lost.retain(|site, _| verdicts.get(site).is_some_and(|v| v.lost_blocks() > 0));
    memory.ledger.call(lost);
    let mut ways = ways(&scanned, subject.instance, reader, dir, memory, &mut tempo)?;
    scanned.cost.cpu_s += (scanner::thread_cpu() - cpu).as_secs_f64();
    let sites = verdicts.into_iter().filter_map(|(site, mut verdict)| {
        memory.ledger.apply(site, &mut verdict);
        Some((*memory.keys.get(site as usize)?, verdict, ways.remove(&site)))
    });
    Ok(Outcome { sites: sites.collect(), cost: scanned.cost, limits: options.limits })
}

/// For each site with reachable blocks, the way by which most of some examples are reached.
fn ways(
    scanned: &Scanned,
    instance: u32,
    reader: &BlockReader,
    dir: ProcDir,
    memory: &mut Memory,
    tempo: &mut Tempo<'_>,
) -> Result<HashMap<u32, Way>> {
    let Scanned { index, marked, maps, .. } = scanned;
    let mut counts: HashMap<u32, usize> = HashMap::new();
    let reachable = |n: &u32| marked.reach(*n) == Reach::Reachable;
    let numbers = 0..index.blocks().len() as u32;
    for number in numbers.clone().filter(reachable) {
        *counts.entry(index.blocks()[number as usize].site).or_default() += 1;
    }
    let mut seen: HashMap<u32, usize> = HashMap::new();
    let mut direct: HashMap<u32, usize> = HashMap::new();
    let pid = dir.pid();
    let mut names = RootNames::new(dir, maps.clone());
    let mut found: HashMap<u32, Vec<Way>> = HashMap::new();
    for number in numbers.filter(reachable) {
        let site = index.blocks()[number as usize].site;
        // The list that a variable begins may change faster than it is read: its first block is known all the same.
        if let Some(Referrer::Root(address)) = marked.referrer(number) {
            let tried = direct.entry(site).or_default();
            if *tried < DIRECT {
                *tried += 1;
                let root = names.name(address);
                if matches!(root, Root::Global { .. }) {
                    *tried = DIRECT;
                    found.entry(site).or_default().push(Way { root, steps: Vec::new() });
                }
            }
        }
        let at = seen.entry(site).or_default();
        // Spread evenly over the site's blocks.
        if *at * EXAMPLES / counts[&site] != (*at + 1) * EXAMPLES / counts[&site] || *at == 0 {
            tempo.go_on()?;
            found.entry(site).or_default().extend(way(scanned, number, &mut names, &memory.keys));
        }
        *at += 1;
    }
    name_newest(found.values_mut().flatten(), (instance, pid), reader, maps, (&mut names, memory), tempo)?;
    let most_frequent = |ways: Vec<Way>| {
        let votes = |way: &Way| ways.iter().filter(|w| same_root(&w.root, &way.root)).count();
        // A variable says most; of equals the shortest way.
        let best = ways.iter().max_by_key(|way| {
            (matches!(way.root, Root::Global { .. }), votes(way), std::cmp::Reverse(way.steps.len()))
        });
        best.cloned()
    };
    Ok(found.into_iter().filter_map(|(site, ways)| Some((site, most_frequent(ways)?))).collect())
}

/// Leads ways on that begin in a block too new for the scan: to whatever has a name and refers to that block's start.
fn name_newest<'a>(
    ways: impl Iterator<Item = &'a mut Way>,
    (instance, pid): (u32, u32),
    reader: &BlockReader,
    maps: &Maps,
    (names, memory): (&mut RootNames, &mut Memory),
    tempo: &mut Tempo<'_>,
) -> Result<()> {
    let mut open: Vec<(u64, &mut Way)> = ways
        .filter_map(|way| match way.root {
            Root::Untracked { address } => Some((address, way)),
            _ => None,
        })
        .collect();
    open.sort_by_key(|(address, _)| *address);
    let mut new: HashMap<u64, (u64, SiteKey)> = HashMap::new();
    // Blocks that were allocated since the scan; all others are in its index.
    let _ = reader.for_each(instance, |b| {
        let first = open.partition_point(|(address, _)| *address < b.address);
        for (address, _) in open[first..].iter().take_while(|(address, _)| *address - b.address < b.size.max(1)) {
            let key = SiteKey { instance, probe_set: b.probe_set, stack: b.stack };
            memory.number(key);
            new.insert(*address, (b.address, key));
        }
    });
    if new.is_empty() {
        return Ok(());
    }
    let mut referrers: HashMap<u64, Option<u64>> = new.values().map(|(start, _)| (*start, None)).collect();
    let mut target = ProcessMemory::new(pid);
    let mut buffer = vec![0; CHUNK];
    let (mut pagemap, mut present) = (Pagemap::open(pid), Vec::new());
    for range in Ranges::of(maps).named {
        pagemap.present(range, &mut |run| present.push(run));
    }
    for Range { start, end } in present {
        let mut at = start;
        while at < end {
            tempo.go_on()?;
            let got = target.read(at, &mut buffer[..((end - at) as usize).min(CHUNK)]);
            for (i, word) in buffer[..got].as_chunks::<8>().0.iter().enumerate() {
                if let Some(referrer) = referrers.get_mut(&u64::from_ne_bytes(*word)) {
                    referrer.get_or_insert(at + 8 * i as u64);
                }
            }
            at += (got as u64).max(4096);
        }
    }
    for (address, way) in open {
        let Some((start, key)) = new.get(&address) else { continue };
        if let Some(Some(referrer)) = referrers.get(start) {
            way.root = names.name(*referrer);
            match way.steps.first_mut() {
                Some(Step::Blocks(first, count)) if first == key => *count += 1,
                _ => way.steps.insert(0, Step::Blocks(*key, 1)),
            }
        }
    }
    Ok(())
}

/// Whether two roots are the same thing: elements of one array are.
fn same_root(a: &Root, b: &Root) -> bool {
    match (a, b) {
        (Root::Global { module: a, name: Some(x), .. }, Root::Global { module: b, name: Some(y), .. }) => {
            (a, x) == (b, y)
        }
        (Root::Untracked { .. }, Root::Untracked { .. }) => true,
        _ => a == b,
    }
}

fn way(scanned: &Scanned, block: u32, names: &mut RootNames, keys: &[SiteKey]) -> Option<Way> {
    let chain = scanned.marked.chain(block, MAX_CHAIN);
    let Some(Referrer::Root(address)) = chain.last() else { return None };
    let root = names.name(*address);
    let mut steps: Vec<Step> = Vec::new();
    for referrer in chain.iter().rev() {
        let Referrer::Block(number) = referrer else { continue };
        let key = *keys.get(scanned.index.blocks()[*number as usize].site as usize)?;
        match steps.last_mut() {
            Some(Step::Blocks(last, count)) if *last == key => *count += 1,
            _ => steps.push(Step::Blocks(key, 1)),
        }
    }
    Some(Way { root, steps: shorten(steps) })
}

/// Keeps the ends of a way with many steps.
fn shorten(steps: Vec<Step>) -> Vec<Step> {
    if steps.len() <= 2 * KEPT_LINKS + 1 {
        return steps;
    }
    let blocks = |s: &Step| match s {
        Step::Blocks(_, n) | Step::Skipped(n) => *n,
    };
    let middle = &steps[KEPT_LINKS..steps.len() - KEPT_LINKS];
    let skipped = Step::Skipped(middle.iter().map(blocks).sum());
    [&steps[..KEPT_LINKS], &[skipped], &steps[steps.len() - KEPT_LINKS..]].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(stack: u64, count: usize) -> Step {
        Step::Blocks(SiteKey { instance: 1, probe_set: 0, stack }, count)
    }

    // A way through a hundred tables is told by its ends, and says how much is left out.
    #[test]
    fn long_ways_keep_their_ends() {
        let short: Vec<Step> = (0..9).map(|n| step(n, 2)).collect();
        assert_eq!(shorten(short.clone()), short);
        let long: Vec<Step> = (0..100).map(|n| step(n, 2)).collect();
        let shown = shorten(long.clone());
        assert_eq!((shown.len(), &shown[4]), (9, &Step::Skipped(184)));
        assert_eq!((&shown[..4], &shown[5..]), (&long[..4], &long[96..]));
    }

    // Slots of one table are one root; a variable's neighbours are not.
    #[test]
    fn elements_of_an_array_are_one_root() {
        let global = |name: &str, offset| Root::Global { module: "m".into(), name: Some(name.into()), offset };
        assert!(same_root(&global("a", 0), &global("a", 64)));
        assert!(!same_root(&global("a", 0), &global("b", 0)));
        assert!(same_root(&Root::Untracked { address: 8 }, &Root::Untracked { address: 64 }));
        assert!(!same_root(&Root::Stack { tid: Some(1) }, &Root::Stack { tid: Some(2) }));
    }
}
