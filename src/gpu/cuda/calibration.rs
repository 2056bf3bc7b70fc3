//! Which way of dispatch is the fastest for which size of fragment, measured on the device at hand when a copier starts. Takes some milliseconds.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use super::device::{Device, Stream};
use super::dispatch::{Dispatch, Thresholds, Way};
use super::driver::Refused;
use super::kernel::{Kernel, Table};
use super::nvrtc;
use super::room::Room;
use crate::gpu::Direction;
use crate::limits::{CALIBRATION_BYTES, GATHER_SMS};

type Answer<T> = std::result::Result<T, Refused>;

/// Sizes of fragments that are tried, in bytes.
const SIZES: [u64; 5] = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20];

/// The kernel takes multiprocessors from the model: it has to be this much faster than the engines to be used, in percent.
const GATHER_GAIN_PERCENT: f64 = 20.0;

/// What was found.
#[derive(Clone)]
pub struct Calibration {
    /// Which way for which fragments.
    pub thresholds: Thresholds,
    /// The kernel, if there is one.
    pub(super) kernel: Option<Arc<Kernel>>,
    /// GB/s to the device for each size of fragment: in batches, by a call for each, by the kernel. 0: not to be had.
    pub rates: Vec<(u64, [f64; 3])>,
    /// Why there is no kernel.
    pub no_kernel: Option<String>,
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
        let below = self.thresholds.gather_below;
        let engines = if self.thresholds.batch { "in batches" } else { "one by one" };
        write!(f, "copies by the engines go {engines}")?;
        if below > 0 {
            write!(f, ", fragments below {} KiB to the GPU by a kernel on {GATHER_SMS} multiprocessors", below >> 10)?;
        }
        match &self.no_kernel {
            Some(why) => write!(f, "; no kernel for small fragments: {why}"),
            None => write!(f, "; measured in {:.0} ms", self.seconds * 1e3),
        }
    }
}

impl Calibration {
    /// Without measuring: no kernel, and batches where the driver has them.
    pub fn assumed(device: &Device) -> Self {
        let thresholds = Thresholds { batch: device.driver.batches(), gather_below: 0 };
        let why = Some("it was not looked for".to_owned());
        Self { thresholds, kernel: None, rates: Vec::new(), no_kernel: why, seconds: 0.0 }
    }

    /// Without measuring: a kernel image that is there, for fragments below `gather_below` bytes.
    ///
    /// # Errors
    /// [`Refused`] when the driver does not load it.
    pub fn with_kernel(device: &Arc<Device>, image: &[u8], gather_below: u64) -> Answer<Self> {
        let kernel = device.with(|| Kernel::load(device, image))?.map(Arc::new);
        let assumed = Self::assumed(device);
        let gather_below = if kernel.is_some() { gather_below } else { 0 };
        Ok(Self { thresholds: Thresholds { gather_below, ..assumed.thresholds }, kernel, ..assumed })
    }
}

/// Compiles the kernel and measures. What cannot be had (NVRTC, memory to measure with) is left out, not refused. To be called with the
/// device's context current.
///
/// # Errors
/// [`Refused`] when the device does not copy.
pub(super) fn calibrate(device: &Arc<Device>, stream: &Stream, nvrtc: &[PathBuf]) -> Answer<Calibration> {
    let started = Instant::now();
    let mut found = Calibration::assumed(device);
    match compile(device, nvrtc) {
        Ok(kernel) => (found.kernel, found.no_kernel) = (Some(Arc::new(kernel)), None),
        Err(why) => found.no_kernel = Some(why),
    }
    match Room::new(device, 2 * CALIBRATION_BYTES) {
        Ok(room) => measure(device, stream, &room, &mut found)?,
        // Nothing to measure with: the engines alone, which need no threshold.
        Err(refused) if refused.is_out_of_memory() => {
            (found.kernel, found.no_kernel) = (None, Some(format!("no memory to measure with: {refused}")));
        }
        Err(refused) => return Err(refused),
    }
    found.seconds = started.elapsed().as_secs_f64();
    Ok(found)
}

/// Calibrates a device of which nobody copies.
///
/// # Errors
/// [`Refused`] when the device does not copy.
pub fn of_device(device: &Arc<Device>, nvrtc: &[PathBuf]) -> Answer<Calibration> {
    device.with(|| calibrate(device, &device.stream()?, nvrtc))
}

fn compile(device: &Arc<Device>, places: &[PathBuf]) -> Result<Kernel, String> {
    let facts = device.facts().map_err(|refused| refused.to_string())?;
    if !facts.host_addresses {
        return Err("the device does not share the host's addresses".to_owned());
    }
    let image = nvrtc::compile(places, facts.capability).map_err(|why| why.to_string())?;
    let kernel = Kernel::load(device, &image).map_err(|refused| refused.to_string())?;
    kernel.ok_or_else(|| "the driver loads no modules".to_owned())
}

fn measure(device: &Arc<Device>, stream: &Stream, room: &Room, found: &mut Calibration) -> Answer<()> {
    let mut dispatch = Dispatch::new(device, found.kernel.clone());
    let mut table = found.kernel.as_ref().map(|_| Table::new(device)).transpose()?;
    let ways =
        [found.thresholds.batch.then_some(Way::Batch), Some(Way::Each), found.kernel.is_some().then_some(Way::Gather)];
    for size in SIZES {
        let fragments = room.scattered(size, CALIBRATION_BYTES / size);
        let mut rates = [0.0; 3];
        for (rate, way) in rates.iter_mut().zip(ways) {
            let Some(way) = way else { continue };
            let mut best = f64::INFINITY;
            // The first round pays for what is set up on first use.
            for _ in 0..3 {
                let started = Instant::now();
                dispatch.hand_over(way, Direction::Load, &fragments, table.as_mut(), stream)?;
                stream.synchronize()?;
                best = best.min(started.elapsed().as_secs_f64());
            }
            *rate = CALIBRATION_BYTES as f64 / best / 1e9;
        }
        found.rates.push((size, rates));
    }
    found.thresholds = decide(&found.rates);
    Ok(())
}

/// The thresholds that these rates call for.
fn decide(rates: &[(u64, [f64; 3])]) -> Thresholds {
    // Small fragments are where the two differ.
    let batch = rates.first().is_some_and(|(_, [batch, each, _])| *batch > 0.0 && batch >= each);
    let mut gather_below = 0;
    for (size, [batch, each, gather]) in rates {
        if *gather < batch.max(*each) * (1.0 + GATHER_GAIN_PERCENT / 100.0) {
            break;
        }
        gather_below = size + 1;
    }
    Thresholds { batch, gather_below }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_used_up_to_where_it_stops_being_faster() {
        let rates = [
            (4096, [5.0, 3.0, 30.0]),
            (16384, [18.0, 12.0, 40.0]),
            (65536, [50.0, 48.0, 50.0]),
            (262_144, [50.0, 50.0, 80.0]),
        ];
        assert_eq!(decide(&rates), Thresholds { batch: true, gather_below: 16385 });
    }

    #[test]
    fn what_is_not_there_is_not_used() {
        assert_eq!(decide(&[(4096, [0.0, 3.0, 0.0])]), Thresholds { batch: false, gather_below: 0 });
        assert_eq!(decide(&[]), Thresholds { batch: false, gather_below: 0 });
    }

    #[test]
    fn slower_batches_are_not_used() {
        assert!(!decide(&[(4096, [2.0, 3.0, 0.0])]).batch);
    }
}
