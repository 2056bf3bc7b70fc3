//! Times copies the way a copier makes them, for `kvcellar bench dma`: the same joining of
//! fragments, the same ways of dispatch, jobs of the same size.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use super::calibration::{self, Calibration};
use super::device::{Device, DeviceEvent, DeviceStream, Facts};
use super::dispatch::Dispatch;
use super::driver::Refused;
use super::kernel::FragmentTable;
use super::room::BothSides;
use super::staging::Staging;
use crate::gpu::Direction;
use crate::gpu::fragments::{self, Fragment};
use crate::limits::{COMMANDS_IN_FLIGHT_MAX, JOB_BYTES, JOB_FRAGMENTS_MAX, JOBS_IN_FLIGHT_MAX};
use kvcellar_block::error::Result;

/// How fragments lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FragmentPlace {
    /// One piece of all bytes: what the others are compared with.
    Whole,
    /// One after another on both sides.
    Neighbours,
    /// Anywhere on the device; on the host one after another in slots, as the layers of a block.
    Scattered,
}

/// What one measurement took.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// From the first call until the last copy was over.
    pub seconds: f64,
    /// Of these, in this thread, handing over. Waiting for earlier copies is not counted.
    pub submit_s: f64,
    /// Fragments after joining.
    pub fragments: usize,
    /// Bytes moved.
    pub bytes: u64,
}

/// A device and memory to measure with.
pub struct Meter {
    device: Arc<Device>,
    stream: DeviceStream,
    room: BothSides,
    dispatch: Dispatch,
    tables: Vec<FragmentTable>,
    calibration: Calibration,
}

impl Meter {
    /// Takes `bytes` on both sides, twice: fragments with gaps need that.
    ///
    /// # Errors
    /// [`kvcellar_block::error::Error::DeviceDead`] without a device or the memory.
    pub fn open(ordinal: i32, bytes: u64, nvrtc: &[PathBuf]) -> Result<Self> {
        let device = Device::open(ordinal)?;
        let calibration = calibration::of_device(&device, nvrtc).map_err(Refused::into_error)?;
        let open = || {
            let kernel = calibration.kernel.clone();
            let tables = FragmentTable::several(&device, if kernel.is_some() { JOBS_IN_FLIGHT_MAX } else { 0 })?;
            let staging = kernel.as_ref().filter(|_| calibration.thresholds.stage_below > 0);
            let staging = staging.map(|kernel| Staging::new(&device, kernel)).transpose()?;
            Ok((device.stream()?, BothSides::new(&device, 2 * bytes)?, Dispatch::new(&device, kernel, staging), tables))
        };
        let (stream, room, dispatch, tables) = device.with(open).map_err(Refused::into_error)?;
        Ok(Self { device, stream, room, dispatch, tables, calibration })
    }

    /// What calibration found.
    pub fn calibration(&self) -> &Calibration {
        &self.calibration
    }

    /// What the device is.
    ///
    /// # Errors
    /// [`kvcellar_block::error::Error::DeviceDead`] when the driver does not tell.
    pub fn facts(&self) -> Result<Facts> {
        self.device.facts().map_err(Refused::into_error)
    }

    /// Copies about `bytes` in fragments of `size` (both powers of two).
    ///
    /// # Errors
    /// [`kvcellar_block::error::Error::DeviceDead`] when the device does not copy.
    pub fn copy(&mut self, direction: Direction, place: FragmentPlace, size: u64, bytes: u64) -> Result<Timing> {
        let mut fragments = match place {
            FragmentPlace::Whole => self.room.whole(),
            FragmentPlace::Neighbours => self.room.neighbours(size),
            FragmentPlace::Scattered => self.room.scattered(size, bytes / size),
        };
        if place != FragmentPlace::Scattered {
            // The room is twice as large, for the gaps.
            let half = fragments.len().div_ceil(2);
            fragments.truncate(half);
            fragments.iter_mut().filter(|_| place == FragmentPlace::Whole).for_each(|whole| whole.len /= 2);
        }
        let device = Arc::clone(&self.device);
        let run = || {
            let timing = self.run(direction, place, &fragments);
            // Nothing is under way when the memory is used again, also after a failure.
            self.stream.synchronize().and(timing)
        };
        device.with(run).map_err(Refused::into_error)
    }

    fn run(
        &mut self,
        direction: Direction,
        place: FragmentPlace,
        fragments: &[Fragment],
    ) -> std::result::Result<Timing, Refused> {
        let mut jobs: Vec<Vec<Fragment>> = jobs(fragments).map(<[Fragment]>::to_vec).collect();
        let mut under_way: VecDeque<(DeviceEvent, usize)> = VecDeque::new();
        let (mut submit_s, mut count, mut commands) = (0.0, 0, 0);
        let started = Instant::now();
        for (number, job) in jobs.iter_mut().enumerate() {
            // As a lane bounds them. The oldest job's table is free then, too.
            while let Some((event, its)) = under_way.front()
                && (under_way.len() >= JOBS_IN_FLIGHT_MAX || commands >= COMMANDS_IN_FLIGHT_MAX)
            {
                if event.is_over()? {
                    commands -= its;
                    under_way.pop_front();
                } else {
                    std::hint::spin_loop();
                }
            }
            let submitted = Instant::now();
            fragments::join(job);
            let way = self.calibration.thresholds.way(direction, job, true);
            let its = way.commands(job.len());
            let tables = self.tables.len().max(1);
            let table = self.tables.get_mut(number % tables);
            self.dispatch.hand_over(way, direction, job, table, &self.stream, None)?;
            submit_s += submitted.elapsed().as_secs_f64();
            count += job.len();
            commands += its;
            let event = self.device.event()?;
            event.record(&self.stream)?;
            under_way.push_back((event, its));
        }
        debug_assert!(place != FragmentPlace::Whole || count == 1);
        self.stream.synchronize()?;
        let seconds = started.elapsed().as_secs_f64();
        Ok(Timing { seconds, submit_s, fragments: count, bytes: fragments::bytes(fragments) })
    }
}

/// As a lane divides them.
fn jobs(fragments: &[Fragment]) -> impl Iterator<Item = &[Fragment]> {
    let size = fragments.first().map_or(1, |first| first.len.max(1));
    fragments.chunks(((JOB_BYTES / size) as usize).clamp(1, JOB_FRAGMENTS_MAX))
}
