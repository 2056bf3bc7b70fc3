//! `kvcellar bench nvme`: what the nvme tier gives, beside a bare ring that does the same I/O.
//!
//! Measured: blocks written from slots of a real pool, and read back into slots of another, through the whole tier (directory, seals, checksums, mover, device), with
//! `io_uring` and with threads; and the same bytes moved by a bare ring with registered memory, without directory and checksums. Interleaved, so that a noisy
//! neighbour hits all alike; CPU time is that of the whole process. Not measured: copies from and to vLLM's KV cache.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use nix::sys::resource::{UsageWho, getrusage};

use super::report::{Goal, Measured, measured, report};
use crate::block::geometry::RankBytes;
use crate::block::plan::StepPlan;
use crate::block::{BlockHash, GroupKind, GroupSpec, Grouping, SlotGeometry, SlotIndex};
use crate::config::{Config, Controls};
use crate::error::{Error, Result};
use crate::limits;
use crate::nvme::buffer::Buffer;
use crate::nvme::disk::{Completion, Completions, Disk, Kind, Operation};
use crate::nvme::{probe, ring::RingDisk};
use crate::pool::open::{self, Wish};
use crate::tier::offload::{GroupOffer, Offer, Start};
use crate::tier::opening::{self, Identity};
use crate::tier::{TierEngine, mover};

const GIB: f64 = (1_u64 << 30) as f64;
const BLOCK_TOKENS: u32 = 16;
/// Extents are whole: one page of descriptor, the rest payload.
const DESCRIPTOR_BYTES: u64 = 4096;

/// Sizes of the benchmark.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Directory on the disk.
    #[arg(long)]
    pub dir: PathBuf,
    /// Shared-memory directory for the pools.
    #[arg(long, default_value = "/dev/shm")]
    pub pool_dir: PathBuf,
    /// Bytes of each extent.
    #[arg(long, value_delimiter = ',', default_values_t = [64 << 10, 1 << 20, 4 << 20])]
    pub sizes: Vec<u64>,
    /// Bytes moved in each measurement.
    #[arg(long, default_value_t = 256 << 20)]
    pub bytes: u64,
    /// Repetitions of each measurement.
    #[arg(long, default_value_t = 5)]
    pub repetitions: usize,
    /// JSON on standard output.
    #[arg(long)]
    pub json: bool,
}

/// One pass in one direction.
#[derive(Debug, Clone, Copy)]
struct Pass {
    gib_per_s: f64,
    cpu_s_per_gib: f64,
}

struct Stopwatch {
    started: Instant,
    cpu_s: f64,
}

fn cpu_s() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)
        .map_err(|errno| Error::io("reading the CPU time of", "this process", errno.into(), "Run it on Linux"))?;
    let seconds = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
}

impl Stopwatch {
    fn start() -> Result<Self> {
        Ok(Self { started: Instant::now(), cpu_s: cpu_s()? })
    }

    fn stop(&self, bytes: u64) -> Result<Pass> {
        let gib = bytes as f64 / GIB;
        let seconds = self.started.elapsed().as_secs_f64();
        Ok(Pass { gib_per_s: gib / seconds, cpu_s_per_gib: (cpu_s()? - self.cpu_s) / gib })
    }
}

/// Runs the benchmark and prints its report. Returns the exit code.
pub fn run(options: &Options) -> i32 {
    match measure(options) {
        Ok((results, goals)) => {
            print(options, &results, &goals);
            0
        }
        Err(error) => {
            eprintln!("kvcellar: {error}");
            1
        }
    }
}

fn print(options: &Options, results: &[Measured], goals: &[Goal]) {
    if options.json {
        println!("{:#}", report(results, goals));
        return;
    }
    for result in results {
        println!("{:<44} {:>8.3} {:<10} ±{:.3}", result.name, result.value, result.unit, result.spread);
    }
    for goal in goals {
        println!("{:<44} {:>8.3} {} ({})", goal.name, goal.value, if goal.met { "met" } else { "NOT MET" }, goal.goal);
    }
}

/// All measurements, with the goals they are held against.
///
/// # Errors
/// What opening pool, store or device says.
pub fn measure(options: &Options) -> Result<(Vec<Measured>, Vec<Goal>)> {
    let (mut results, mut goals) = (Vec::new(), Vec::new());
    let bar = ProgressBar::new((options.sizes.len() * options.repetitions * 3) as u64).with_style(
        ProgressStyle::with_template("{bar:40} {pos}/{len} {msg}").unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    for size in &options.sizes {
        if *size <= DESCRIPTOR_BYTES || !size.is_multiple_of(limits::SLOT_ALIGN) {
            return Err(Error::config("sizes", format!("{size} is no multiple of 4096 above 4096"), "Write 65536"));
        }
        let count = (options.bytes / size).max(1) as u32;
        let mut passes: Vec<(&str, [Vec<Pass>; 2])> = ["bare ring", "tier, io_uring", "tier, threads"]
            .into_iter()
            .map(|name| (name, Default::default()))
            .collect();
        for _ in 0..options.repetitions {
            for (name, both) in &mut passes {
                bar.set_message(format!("{} KiB, {name}", size >> 10));
                let [write, read] = match *name {
                    "bare ring" => bare(options, *size, count)?,
                    "tier, io_uring" => tier(options, "io_uring", *size, count)?,
                    _ => tier(options, "threads", *size, count)?,
                };
                both[0].push(write);
                both[1].push(read);
                bar.inc(1);
            }
        }
        conclude(*size, &passes, &mut results, &mut goals);
    }
    bar.finish_and_clear();
    Ok((results, goals))
}

fn conclude(size: u64, passes: &[(&str, [Vec<Pass>; 2])], results: &mut Vec<Measured>, goals: &mut Vec<Goal>) {
    for (direction, kind) in ["write", "read"].into_iter().enumerate() {
        for (name, both) in passes {
            let label = format!("{kind} {} KiB, {name}", size >> 10);
            results.push(measured(&label, "GiB/s", both[direction].iter().map(|pass| pass.gib_per_s).collect()));
            results.push(measured(
                &format!("{label}, CPU"),
                "s/GiB",
                both[direction].iter().map(|pass| pass.cpu_s_per_gib).collect(),
            ));
        }
        // Pass by pass, so that what slows one slows the other.
        let (bare, tier) = (&passes[0].1[direction], &passes[1].1[direction]);
        let ratio = |of: fn(&Pass) -> f64| {
            measured("", "", tier.iter().zip(bare).map(|(tier, bare)| of(tier) / of(bare)).collect()).value
        };
        let speed = ratio(|pass| pass.gib_per_s);
        goals.push(Goal {
            name: format!("{kind} {} KiB: tier over bare ring, speed", size >> 10),
            goal: "at least 0.95".to_owned(),
            value: speed,
            met: speed >= 0.95,
        });
        let cost = ratio(|pass| pass.cpu_s_per_gib);
        goals.push(Goal {
            name: format!("{kind} {} KiB: tier over bare ring, CPU", size >> 10),
            goal: "at most 1.3".to_owned(),
            value: cost,
            met: cost <= 1.3,
        });
    }
}

/// Collects buffers and keeps the first failure.
#[derive(Default)]
struct Counter {
    state: Mutex<(Vec<Buffer>, Option<String>)>,
    changed: Condvar,
}

impl Completions for Counter {
    fn complete(&self, completions: Vec<Completion>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = completions.iter().find_map(|completion| completion.outcome.err()) {
            state.1.get_or_insert(error.to_string());
        }
        state.0.extend(completions.into_iter().map(|completion| completion.buffer));
        self.changed.notify_all();
    }
}

impl Counter {
    fn wait_for(&self, wanted: usize) -> Result<Vec<Buffer>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.0.len() < wanted {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let buffers = std::mem::take(&mut state.0);
        state.1.take().map_or(Ok(buffers), |problem| Err(failed("the bare ring", problem)))
    }
}

fn failed(device: &str, problem: String) -> Error {
    Error::DeviceDead { device: device.to_owned(), problem, remedy: "Try another --dir".to_owned() }
}

/// A directory that goes with everything in it.
struct Scratch(PathBuf);

impl Scratch {
    fn make(parent: &Path) -> Result<Self> {
        let parent = std::path::absolute(parent).map_err(|error| Error::io("finding", parent, error, "Check --dir"))?;
        let path = parent.join(format!("kvcellar-bench-{}", std::process::id()));
        std::fs::create_dir_all(&path).map_err(|error| Error::io("creating", &path, error, "Check --dir"))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What stays behind is named for this benchmark and can be removed by hand.
        drop(std::fs::remove_dir_all(&self.0));
    }
}

fn bare(options: &Options, size: u64, count: u32) -> Result<[Pass; 2]> {
    let dir = Scratch::make(&options.dir)?;
    let counter = Arc::new(Counter::default());
    let (arena, mut buffers) = Buffer::pieces(count as usize, size as usize);
    let completions: Arc<dyn Completions> = Arc::clone(&counter) as Arc<dyn Completions>;
    let (disk, _) = RingDisk::start(vec![arena], completions, limits::DISK_BYTES_IN_FLIGHT)?;
    let path = dir.0.join("bare");
    let (file, _) = probe::open_segment(&path, true)?;
    let room = i64::try_from(size * u64::from(count)).unwrap_or(i64::MAX);
    nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 0, room)
        .map_err(|errno| Error::io("preallocating", &path, errno.into(), "Check the free space of --dir"))?;
    disk.add_segment(file)?;
    let mut passes = Vec::with_capacity(2);
    for kind in [Kind::Write, Kind::Read] {
        let operation =
            |(index, buffer): (u64, Buffer)| Operation { token: index, kind, segment: 0, offset: index * size, buffer };
        let operations = (0..).zip(buffers).map(operation).collect();
        let watch = Stopwatch::start()?;
        disk.submit(operations);
        buffers = counter.wait_for(count as usize)?;
        passes.push(watch.stop(size * u64::from(count))?);
    }
    Ok([passes[0], passes[1]])
}

fn hash(index: u32) -> BlockHash {
    let mut bytes = [0_u8; 32];
    for (at, word) in bytes.chunks_exact_mut(8).enumerate() {
        let mixed = (u64::from(index) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(at as u32 * 16);
        word.copy_from_slice(&mixed.to_le_bytes());
    }
    BlockHash::of_digest(bytes)
}

struct Session {
    engine: Arc<Mutex<TierEngine>>,
    _mover: mover::Mover,
}

impl Session {
    fn open(options: &Options, dir: &Path, device: &str, size: u64, count: u32) -> Result<Self> {
        let group =
            GroupSpec { kind: GroupKind::Full, kind_name: "full".to_owned(), block_tokens: BLOCK_TOKENS, eagle: false };
        let grouping = Grouping { groups: vec![group], hash_tokens: BLOCK_TOKENS, hit_tokens: BLOCK_TOKENS };
        let rank = RankBytes { block_bytes: vec![size - DESCRIPTOR_BYTES], replica_of: None };
        let geometry = SlotGeometry::lay_out(&grouping, &[rank])?;
        let slots = u64::from(count) + u64::from(limits::WINDOW_SLOTS_MAX);
        let json = serde_json::json!({
            "nvme_dir": dir, "nvme_size": options.bytes * 2 + (256 << 20), "nvme_reserve": 1 << 20, "nvme_engine": device,
            "write_through": true, "events": false,
        });
        let config = Config::parse(&json.to_string())?;
        let pools = Scratch::make(&options.pool_dir)?;
        let bytes = limits::HEADER_BYTES + limits::SLOT_ALIGN + slots * (geometry.slot_bytes + 64);
        let namespace = [7; 16];
        let wish = Wish {
            pool_dir: &pools.0,
            namespace,
            facts: "{}",
            bytes,
            explicit: true,
            adopt: false,
            geometry: &geometry,
        };
        let opened = open::open(&wish, &mut |_, _| ())?;
        let engine = Arc::new(Mutex::new(TierEngine::new(&config, grouping)?));
        engine.lock().unwrap_or_else(PoisonError::into_inner).open_pool(opened.pool, false);
        let identity = Identity { namespace, facts: "{}", stable: true };
        let opened = opening::open_disk(&engine, &config, identity, &mut |_, _| ())?;
        let (mover, _) = opened.ok_or_else(|| failed("the nvme tier", "it did not open".to_owned()))?;
        Ok(Self { engine, _mover: mover })
    }

    fn with<T>(&self, work: impl FnOnce(&mut TierEngine) -> T) -> T {
        work(&mut self.engine.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn wait(&self) {
        while !self.with(|engine| engine.disk_is_idle()) {
            sleep(Duration::from_micros(500));
        }
    }
}

fn tier(options: &Options, device: &str, size: u64, count: u32) -> Result<[Pass; 2]> {
    let dir = Scratch::make(&options.dir)?;
    let bytes = size * u64::from(count);
    let hashes: Vec<BlockHash> = (0..count).map(hash).collect();
    let session = Session::open(options, &dir.0, device, size, count)?;
    let plan = session.with(|engine| {
        engine.add_request("write", Controls::default(), "");
        engine.add_hashes("write", &hashes);
        let group = GroupOffer { first: 0, blocks: (1..=count).collect(), extra: Vec::new() };
        let tokens = vec![1; (count * BLOCK_TOKENS) as usize];
        engine.offer(&Offer { request: "write", tokens_from: 0, tokens, groups: vec![group] }, Start::AfterStep);
        engine.take_plan()
    });
    let plan = StepPlan::decode(&plan)?;
    session.with(|engine| {
        if let Some(pool) = engine.pool() {
            plan.stores_after.iter().for_each(|copy| pool.line(SlotIndex(copy.slot)).answer(0, true));
        }
    });
    let watch = Stopwatch::start()?;
    session.with(TierEngine::poll);
    session.wait();
    let write = watch.stop(bytes)?;
    let written = session.with(|engine| engine.gauges().nvme_blocks);
    mover::shut(&session.engine);
    drop(session);
    if written != u64::from(count) {
        return Err(failed("the nvme tier", format!("{written} of {count} blocks were written")));
    }
    let session = Session::open(options, &dir.0, device, size, count)?;
    let watch = session.with(|engine| {
        engine.add_request("read", Controls::default(), "");
        engine.add_hashes("read", &hashes);
        let watch = Stopwatch::start();
        engine.lookup("read", count * BLOCK_TOKENS + 1, 0);
        engine.admit("read", count * BLOCK_TOKENS, &[(1..=count).collect()]);
        watch
    })?;
    session.wait();
    let read = watch.stop(bytes)?;
    let restored = session.with(|engine| engine.counters().restored_blocks);
    mover::shut(&session.engine);
    if restored != u64::from(count) {
        return Err(failed("the nvme tier", format!("{restored} of {count} blocks came back")));
    }
    Ok([write, read])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tiny_run_measures_everything() {
        let dir = tempfile::tempdir_in(".").expect("a directory");
        let options = Options {
            dir: dir.path().to_owned(),
            pool_dir: PathBuf::from("/dev/shm"),
            sizes: vec![64 << 10],
            bytes: 2 << 20,
            repetitions: 1,
            json: true,
        };
        let (results, goals) = measure(&options).expect("a run");
        assert_eq!((results.len(), goals.len()), (12, 4));
        assert!(results.iter().all(|result| result.value > 0.0), "{results:?}");
    }
}
