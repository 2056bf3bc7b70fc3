//! `kvcellar bench dma`: what the bus to a GPU gives, over the size of fragments and their order,
//! each way, beside one copy of the same bytes in one piece in the same run.
//!
//! Measured: rates of copies as a copier makes them (joined, dispatched as calibrated, jobs of the
//! same size), and the time that handing fragments over takes. Not measured: the engine around it,
//! and what copies cost a model that runs meanwhile (`scripts/gpu-check` does that from Python).

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::report::{Goal, GoalBound, Measured, measured, print, report};
use kvcellar_block::error::Result;
use kvcellar_engine::gpu::Direction;
use kvcellar_engine::gpu::cuda::meter::{FragmentPlace, Meter, Timing};

/// Sizes of fragments, in KiB.
const SIZES_KIB: [u64; 8] = [4, 8, 16, 64, 256, 512, 1024, 4096];

/// What to measure.
#[derive(Debug, Clone, Args)]
pub struct DmaBench {
    /// The GPU, as torch numbers it.
    #[arg(long, default_value_t = 0)]
    pub device: i32,
    /// MiB that each copy moves: a power of two.
    #[arg(long, default_value_t = 256)]
    pub mib: u64,
    /// How often each is measured.
    #[arg(long, default_value_t = 7)]
    pub repetitions: usize,
    /// Files that may be NVRTC, which compiles the kernel for small fragments.
    #[arg(long)]
    pub nvrtc: Vec<PathBuf>,
    /// JSON on standard output.
    #[arg(long)]
    pub json: bool,
}

/// All results of one run.
pub struct DmaFindings {
    results: Vec<Measured>,
    goals: Vec<Goal>,
    device: Value,
}

/// Measures, prints. Exit code 1 without a GPU.
///
/// # Errors
/// As [`measure`].
pub fn run(options: &DmaBench) -> Result<()> {
    let found = measure(options)?;
    if options.json {
        let mut report = report(&found.results, &found.goals);
        report["device"] = found.device;
        println!("{report:#}");
    } else {
        println!("{}", found.device["calibration"].as_str().unwrap_or_default());
        print(&found.results, &found.goals, 3);
    }
    Ok(())
}

/// Measures everything.
///
/// # Errors
/// [`kvcellar_block::error::Error::DeviceDead`] without a GPU;
/// [`kvcellar_block::error::Error::Config`] for a size that is no power of two.
pub fn measure(options: &DmaBench) -> Result<DmaFindings> {
    let bytes = options.mib << 20;
    if !options.mib.is_power_of_two() || options.mib < 8 {
        let problem = format!("{} is no power of two from 8 on", options.mib);
        return Err(kvcellar_block::error::Error::config("--mib", problem, "Write 64 or 256"));
    }
    let mut meter = Meter::open(options.device, bytes, &options.nvrtc)?;
    let facts = meter.facts()?;
    let (mut results, mut goals) = (Vec::new(), Vec::new());
    for (direction, name) in [(Direction::Load, "to GPU"), (Direction::Offload, "from GPU")] {
        for kib in SIZES_KIB {
            for (place, order) in [(FragmentPlace::Neighbours, "contiguous"), (FragmentPlace::Scattered, "shuffled")] {
                let name = format!("{name}, {kib} KiB, {order}");
                let runs = side_by_side(&mut meter, direction, place, kib << 10, bytes, options.repetitions)?;
                judge(&name, kib, place, &runs, &mut results, &mut goals);
            }
        }
    }
    let device = json!({
        "name": facts.name,
        "capability": facts.capability,
        "multiprocessors": facts.multiprocessors,
        "calibration": meter.calibration().to_string(),
        "calibration_rates_gb_s": meter.calibration().rates.iter().map(|rates| json!({
            "bytes": rates.size,
            "to_gpu": { "batch": rates.up[0], "each": rates.up[1], "kernel": rates.up[2] },
            "from_gpu": { "batch": rates.down[0], "each": rates.down[1], "packed": rates.down[2] },
        })).collect::<Vec<_>>(),
    });
    Ok(DmaFindings { results, goals, device })
}

/// Fragments and the whole in turn, so that both see the same bus. The first pair warms up.
fn side_by_side(
    meter: &mut Meter,
    direction: Direction,
    place: FragmentPlace,
    size: u64,
    bytes: u64,
    repetitions: usize,
) -> Result<Vec<(Timing, Timing)>> {
    let mut runs = Vec::with_capacity(repetitions);
    for turn in 0..=repetitions {
        let fragments = meter.copy(direction, place, size, bytes)?;
        let whole = meter.copy(direction, FragmentPlace::Whole, bytes, bytes)?;
        if turn > 0 {
            runs.push((fragments, whole));
        }
    }
    Ok(runs)
}

fn judge(
    name: &str,
    kib: u64,
    place: FragmentPlace,
    runs: &[(Timing, Timing)],
    results: &mut Vec<Measured>,
    goals: &mut Vec<Goal>,
) {
    let rate = |timing: &Timing| timing.bytes as f64 / timing.seconds / 1e9;
    let series = |value: &dyn Fn(&(Timing, Timing)) -> f64| runs.iter().map(value).collect::<Vec<_>>();
    let share =
        measured(&format!("{name}: of one piece"), "", series(&|(fragments, whole)| rate(fragments) / rate(whole)));
    let submit = measured(
        &format!("{name}: submit"),
        "us a fragment",
        series(&|(fragments, _)| fragments.submit_s * 1e6 / fragments.fragments as f64),
    );
    let least = if kib >= 512 {
        Some(0.97)
    } else if kib == 8 && place == FragmentPlace::Scattered {
        Some(0.85)
    } else {
        None
    };
    if let Some(least) = least {
        goals.push(Goal::of(share.name.clone(), GoalBound::AtLeast(least), share.value));
    }
    // Of larger fragments there are few in a job: what a call costs is divided by few.
    if place == FragmentPlace::Scattered && kib <= 64 {
        goals.push(Goal::of(submit.name.clone(), GoalBound::AtMost(0.1), submit.value));
    }
    results.push(measured(name, "GB/s", series(&|(fragments, _)| rate(fragments))));
    results.push(measured(&format!("{name}: the same in one piece"), "GB/s", series(&|(_, whole)| rate(whole))));
    results.extend([share, submit]);
}
