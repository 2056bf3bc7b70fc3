//! Which way of dispatch is the fastest for which size of fragment, measured on the device at hand
//! before vLLM serves. Takes some milliseconds, and some more to compile the kernel.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use super::device::{Device, DeviceStream};
use super::dispatch::{Dispatch, DispatchWay, Thresholds};
use super::driver::Answer;
use super::kernel::{FragmentTable, GatherKernel};
use super::nvrtc;
use super::room::BothSides;
use super::staging::Staging;
use crate::gpu::Direction;
use crate::gpu::fragments::Fragment;
use crate::limits::{CALIBRATION_BYTES, GATHER_SMS};

/// Sizes of fragments that are tried, in bytes.
const SIZES: [u64; 5] = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20];

/// The kernel takes multiprocessors from the model: it has to be this much faster than the engines
/// to be used, in percent.
const GATHER_GAIN_PERCENT: f64 = 20.0;

/// A call for each fragment takes our own processor's time: it has to be this much faster than
/// batches to be used, in percent.
const EACH_GAIN_PERCENT: f64 = 10.0;

/// Jobs in which the bytes are handed over: one is moved while the next one is prepared.
const JOBS: usize = 4;

/// Rates of one size of fragments, in GB/s. 0: not to be had.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CopyRates {
    /// Bytes of a fragment.
    pub size: u64,
    /// To the device: in batches, by a call for each, by the kernel.
    pub up: [f64; 3],
    /// To the host: in batches, by a call for each, packed by the kernel.
    pub down: [f64; 3],
}

/// What was found.
#[derive(Clone)]
pub struct Calibration {
    /// Which way for which fragments.
    pub thresholds: Thresholds,
    /// The kernel, if there is one.
    pub(super) kernel: Option<Arc<GatherKernel>>,
    /// Of each size that was tried.
    pub rates: Vec<CopyRates>,
    /// Why there is no kernel.
    pub no_kernel: Option<String>,
    /// Ways that were refused: they are not used.
    pub refused: Vec<String>,
    /// How long it took, in seconds.
    pub seconds: f64,
}

impl fmt::Debug for Calibration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Calibration").field("thresholds", &self.thresholds).finish_non_exhaustive()
    }
}

impl fmt::Display for Calibration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Thresholds { batch, gather_below, stage_below } = self.thresholds;
        write!(f, "copies by the engines go {}", if batch { "in batches" } else { "one by one" })?;
        if gather_below > 0 {
            write!(
                f,
                ", fragments below {} KiB to the GPU by a kernel on {GATHER_SMS} multiprocessors",
                gather_below >> 10
            )?;
        }
        if stage_below > 0 {
            write!(f, ", fragments below {} KiB from the GPU packed by it first", stage_below >> 10)?;
        }
        if let Some(why) = &self.no_kernel {
            write!(f, "; no kernel for small fragments: {why}")?;
        }
        for refused in &self.refused {
            write!(f, "; {refused}")?;
        }
        if self.seconds > 0.0 { write!(f, "; measured in {:.0} ms", self.seconds * 1e3) } else { Ok(()) }
    }
}

impl Calibration {
    /// Without measuring: no kernel, and batches where the driver has them.
    pub fn assumed(device: &Device) -> Self {
        let thresholds = Thresholds { batch: device.driver.batches(), gather_below: 0, stage_below: 0 };
        let why = Some("it was not looked for".to_owned());
        Self { thresholds, kernel: None, rates: Vec::new(), no_kernel: why, refused: Vec::new(), seconds: 0.0 }
    }

    /// Without measuring: a kernel image that is there, for fragments below `gather_below` bytes to
    /// the device and `stage_below` to the host.
    ///
    /// # Errors
    /// [`super::driver::Refused`] when the driver does not load it.
    pub fn with_kernel(device: &Arc<Device>, image: &[u8], gather_below: u64, stage_below: u64) -> Answer<Self> {
        let assumed = Self::assumed(device);
        Ok(match device.with(|| GatherKernel::load(device, image))? {
            Some(kernel) => {
                let thresholds = Thresholds { gather_below, stage_below, ..assumed.thresholds };
                Self { thresholds, kernel: Some(Arc::new(kernel)), no_kernel: None, ..assumed }
            }
            None => assumed,
        })
    }
}

/// Compiles the kernel and measures, on a device of which nobody copies. What cannot be had (NVRTC,
/// memory to measure with, a way of copying) is left out, not refused.
///
/// # Errors
/// [`super::driver::Refused`] when the device does not work.
pub fn of_device(device: &Arc<Device>, nvrtc: &[PathBuf]) -> Answer<Calibration> {
    device.with(|| {
        let started = Instant::now();
        let mut found = Calibration::assumed(device);
        match compile(device, nvrtc) {
            Ok(kernel) => (found.kernel, found.no_kernel) = (Some(Arc::new(kernel)), None),
            Err(why) => found.no_kernel = Some(why),
        }
        let stream = device.stream()?;
        match Bench::new(device, found.kernel.as_ref()) {
            Ok(mut bench) => {
                bench.measure(&stream, &mut found);
                found.thresholds = decide(&found.rates);
            }
            // Nothing to measure with: the engines alone, which need no threshold.
            Err(refused) => {
                (found.kernel, found.no_kernel) = (None, Some(format!("nothing to measure with: {refused}")));
            }
        }
        stream.synchronize()?;
        found.seconds = started.elapsed().as_secs_f64();
        Ok(found)
    })
}

fn compile(device: &Arc<Device>, places: &[PathBuf]) -> Result<GatherKernel, String> {
    let facts = device.facts().map_err(|refused| refused.to_string())?;
    if !facts.host_addresses {
        return Err("the device does not share the host's addresses".to_owned());
    }
    let image = nvrtc::compile(places, facts.capability).map_err(|why| why.to_string())?;
    let kernel = GatherKernel::load(device, &image).map_err(|refused| refused.to_string())?;
    kernel.ok_or_else(|| "the driver loads no modules".to_owned())
}

/// What copies are measured with.
struct Bench {
    room: BothSides,
    dispatch: Dispatch,
    tables: Vec<FragmentTable>,
}

impl Bench {
    fn new(device: &Arc<Device>, kernel: Option<&Arc<GatherKernel>>) -> Answer<Self> {
        let room = BothSides::new(device, 2 * CALIBRATION_BYTES)?;
        let tables = FragmentTable::several(device, if kernel.is_some() { JOBS } else { 0 })?;
        // Without memory for it there is no packing.
        let staging = kernel.and_then(|kernel| Staging::new(device, kernel).ok());
        Ok(Self { room, tables, dispatch: Dispatch::new(device, kernel.cloned(), staging) })
    }

    fn measure(&mut self, stream: &DeviceStream, found: &mut Calibration) {
        for size in SIZES {
            let mut rates = CopyRates { size, up: [0.0; 3], down: [0.0; 3] };
            for (direction, rates) in [(Direction::Load, &mut rates.up), (Direction::Offload, &mut rates.down)] {
                for (rate, way) in rates.iter_mut().zip(self.dispatch.ways(direction)) {
                    let Some(way) = way else { continue };
                    match self.rate(way, direction, size, stream) {
                        Ok(measured) => *rate = measured,
                        Err(refused) => found.refused.push(format!("{way:?} for {} KiB: {refused}", size >> 10)),
                    }
                }
            }
            found.rates.push(rates);
        }
    }

    /// GB/s of the best of a few rounds: others may use the bus. The first round pays for what is
    /// set up on first use.
    fn rate(&mut self, way: DispatchWay, direction: Direction, size: u64, stream: &DeviceStream) -> Answer<f64> {
        let fragments = self.room.scattered(size, CALIBRATION_BYTES / size);
        let mut best = f64::INFINITY;
        for _ in 0..4 {
            let mut jobs: Vec<Vec<Fragment>> =
                fragments.chunks(fragments.len().div_ceil(JOBS)).map(<[Fragment]>::to_vec).collect();
            let started = Instant::now();
            let mut given = Ok(());
            for (at, job) in jobs.iter_mut().enumerate() {
                given = self.dispatch.hand_over(way, direction, job, self.tables.get_mut(at), stream, None);
                if given.is_err() {
                    break;
                }
            }
            // What was given is over before its tables are used again.
            stream.synchronize()?;
            given?;
            best = best.min(started.elapsed().as_secs_f64());
        }
        Ok(CALIBRATION_BYTES as f64 / best / 1e9)
    }
}

/// The thresholds that these rates call for.
fn decide(rates: &[CopyRates]) -> Thresholds {
    // Small fragments are where the two differ; a single measurement may be disturbed.
    let small = rates.iter().take(2).flat_map(|rates| [rates.up, rates.down]);
    let (batch, each) = small.fold((0.0, 0.0), |sums, [batch, each, _]| (sums.0 + batch, sums.1 + each));
    let below = |way: fn(&CopyRates) -> [f64; 3]| {
        let gains = |rates: &&CopyRates| {
            let [batch, each, kernel] = way(rates);
            kernel >= batch.max(each) * (1.0 + GATHER_GAIN_PERCENT / 100.0) && kernel > 0.0
        };
        rates.iter().take_while(gains).last().map_or(0, |rates| rates.size + 1)
    };
    Thresholds {
        batch: batch > 0.0 && batch * (1.0 + EACH_GAIN_PERCENT / 100.0) >= each,
        gather_below: below(|rates| rates.up),
        stage_below: below(|rates| rates.down),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(size: u64, up: [f64; 3], down: [f64; 3]) -> CopyRates {
        CopyRates { size, up, down }
    }

    #[test]
    fn the_kernel_is_used_up_to_where_it_stops_being_faster() {
        let rates = [
            rates(4096, [5.0, 3.0, 30.0], [5.0, 3.0, 45.0]),
            rates(16384, [18.0, 12.0, 40.0], [18.0, 12.0, 50.0]),
            rates(65536, [50.0, 48.0, 50.0], [40.0, 30.0, 50.0]),
            rates(262_144, [50.0, 50.0, 80.0], [50.0, 50.0, 50.0]),
        ];
        assert_eq!(decide(&rates), Thresholds { batch: true, gather_below: 16385, stage_below: 65537 });
    }

    #[test]
    fn what_is_not_there_is_not_used() {
        let nothing = Thresholds { batch: false, gather_below: 0, stage_below: 0 };
        assert_eq!(decide(&[rates(4096, [0.0, 3.0, 0.0], [0.0, 3.0, 0.0])]), nothing);
        assert_eq!(decide(&[rates(4096, [0.0; 3], [0.0; 3])]), nothing);
        assert_eq!(decide(&[]), nothing);
    }

    #[test]
    fn batches_are_used_unless_they_are_clearly_slower() {
        let one = |batch: f64| decide(&[rates(4096, [batch, 3.0, 0.0], [batch, 3.0, 0.0])]).batch;
        assert!(one(3.0) && one(2.9));
        assert!(!one(2.0));
    }
}
