//! The copier of a GPU: hands orders to a thread of its own, which gives them to the device and
//! asks whether they are over.
//!
//! What happens on vLLM's thread: an event is recorded on its stream (`mark`), orders go into a
//! queue (`submit`), and a fence waits until the copies it names have been handed to the device,
//! not until they are over. Loads go before offloads, each direction on its own stream of lowest
//! priority.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, bounded, unbounded};

use super::calibration::Calibration;
use super::device::{Device, DeviceStream};
use super::driver::Refused;
use super::lane::{Common, ComputeMark, Lane};
use super::notes::Notes;
use super::pinning::Pinning;
use super::staging::Staging;
use crate::gpu::sides::Sides;
use crate::gpu::{After, Answers, ComputeStream, Copier, CopyError, Direction, Order};
use crate::limits::{JOB_POLL_US, PIN_CHUNK_BYTES, PIN_PIECE_BYTES};
use kvcellar_block::error::{Error, Result};
use kvcellar_block::plan::BlockCopy;

/// What a copier may use.
#[derive(Debug, Clone)]
pub struct CopierOptions {
    /// The device, as torch numbers it.
    pub ordinal: i32,
    /// Bytes of the pool that are pinned at once.
    pub pin_chunk_bytes: u64,
    /// The least bytes that are tried when the driver refuses more.
    pub pin_piece_bytes: u64,
    /// How fragments are dispatched.
    pub calibration: Calibration,
}

impl CopierOptions {
    /// For a device, with everything else as it is meant to be.
    pub fn of(ordinal: i32, calibration: Calibration) -> Self {
        Self { ordinal, pin_chunk_bytes: PIN_CHUNK_BYTES, pin_piece_bytes: PIN_PIECE_BYTES, calibration }
    }
}

enum Message {
    Orders(Vec<Order>, Option<Arc<ComputeMark>>),
    Fence { compute: ComputeStream, offloads: Vec<BlockCopy>, reply: Sender<bool> },
}

/// Copies by streams. Orders in flight are bounded by the tier engine, as for the host's copier.
pub struct CudaCopier {
    messages: Option<Sender<Message>>,
    thread: Option<JoinHandle<()>>,
    device: Arc<Device>,
    marks: AtomicU64,
    in_flight: Arc<AtomicUsize>,
    dead: Arc<AtomicBool>,
    notes: Arc<Notes>,
}

impl CudaCopier {
    /// Opens the device, begins to pin the pool, and starts the thread.
    ///
    /// # Errors
    /// [`Error::DeviceDead`] without a driver, a device or a thread.
    pub fn start(sides: Sides, answers: Arc<dyn Answers>, options: &CopierOptions) -> Result<Self> {
        let device = Device::open(options.ordinal)?;
        let streams = device.with(|| Ok((device.stream()?, device.stream()?))).map_err(Refused::into_error)?;
        let notes = Arc::new(Notes::default());
        let (in_flight, dead) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (messages, queue) = unbounded();
        let pool = Arc::clone(&sides.pool);
        let common = Common {
            pinning: Pinning::start(
                pool,
                Arc::clone(&device),
                Arc::clone(&notes),
                options.pin_chunk_bytes,
                options.pin_piece_bytes,
            ),
            device: Arc::clone(&device),
            sides,
            answers,
            notes: Arc::clone(&notes),
            in_flight: Arc::clone(&in_flight),
            dead: Arc::clone(&dead),
        };
        let options = options.clone();
        let thread = thread::Builder::new()
            .name("kvcellar-copy".to_owned())
            .spawn(move || run(&common, streams, &options, &queue))
            .map_err(|error| {
                dead_thread(&format!("no thread could be started ({error})"), "Raise the limit on processes")
            })?;
        Ok(Self {
            messages: Some(messages),
            thread: Some(thread),
            device,
            marks: AtomicU64::new(0),
            in_flight,
            dead,
            notes,
        })
    }

    fn send(&self, message: Message) -> Result<()> {
        let gone = || dead_thread("it copies no more", "Restart the engine");
        if self.dead.load(Ordering::Acquire) {
            return Err(gone());
        }
        self.messages.as_ref().ok_or_else(gone)?.send(message).map_err(|_| gone())
    }
}

fn dead_thread(problem: &str, remedy: &str) -> Error {
    Error::DeviceDead { device: "the GPU's copier".to_owned(), problem: problem.to_owned(), remedy: remedy.to_owned() }
}

impl Copier for CudaCopier {
    fn submit(&self, orders: &[Order], after: &After) -> Result<()> {
        // A place of another copier's making does not occur.
        let mark = after.0.clone().and_then(|mark| mark.downcast::<ComputeMark>().ok());
        self.in_flight.fetch_add(orders.len(), Ordering::AcqRel);
        self.send(Message::Orders(orders.to_vec(), mark)).inspect_err(|_| {
            self.in_flight.fetch_sub(orders.len(), Ordering::AcqRel);
        })
    }

    fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Acquire)
    }

    fn mark(&self, compute: Option<ComputeStream>) -> Result<After> {
        let Some(compute) = compute else {
            return Err(dead_thread("vLLM's stream was not named", "This is a bug in the connector"));
        };
        let event = self.device.with(|| {
            let event = self.device.event()?;
            event.record_on(compute).map(|()| event)
        });
        let event = event.map_err(Refused::into_error)?;
        let number = self.marks.fetch_add(1, Ordering::Relaxed) + 1;
        Ok(After(Some(Arc::new(ComputeMark { number, event }))))
    }

    fn fence(&self, compute: Option<ComputeStream>, offloads: &[BlockCopy]) -> bool {
        let Some(compute) = compute else { return false };
        let (reply, held) = bounded(1);
        let message = Message::Fence { compute, offloads: offloads.to_vec(), reply };
        // A thread that ended drops the other end.
        self.send(message).is_ok() && held.recv().unwrap_or(false)
    }

    fn take_notes(&self) -> Vec<String> {
        self.notes.take()
    }
}

impl Drop for CudaCopier {
    /// Carries out what was submitted, then ends: a buffer in flight is never abandoned.
    fn drop(&mut self) {
        self.messages = None;
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has waited for its streams.
            drop(thread.join());
        }
    }
}

/// The thread: until the copier is dropped and everything is answered.
fn run(common: &Common, streams: (DeviceStream, DeviceStream), options: &CopierOptions, queue: &Receiver<Message>) {
    let device = Arc::clone(&common.device);
    let ended = device.with(|| {
        device.stay_out_of_captures();
        let mut lanes = Lanes::new(common, streams, options)?;
        while lanes.take_messages(common, queue) {
            lanes.work(common, queue);
        }
        Ok(())
    });
    if let Err(refused) = ended {
        common.dead.store(true, Ordering::Release);
        common.notes.push(format!("the GPU cannot copy: {refused}. Restart the engine"));
        refuse_all(common, queue);
    }
}

/// Without lanes every order is answered as failed.
fn refuse_all(common: &Common, queue: &Receiver<Message>) {
    for message in queue {
        if let Message::Orders(orders, _) = message {
            for order in &orders {
                common.answers.answer(order, Err(CopyError::Device));
                common.in_flight.fetch_sub(1, Ordering::AcqRel);
            }
        }
    }
}

struct Lanes {
    loads: Lane,
    offloads: Lane,
}

impl Lanes {
    fn new(
        common: &Common,
        (up, down): (DeviceStream, DeviceStream),
        options: &CopierOptions,
    ) -> std::result::Result<Self, Refused> {
        let device = &common.device;
        let calibration = &options.calibration;
        common.notes.push(calibration.to_string());
        let thresholds = calibration.thresholds;
        let kernel = calibration.kernel.as_ref();
        let staging = kernel.filter(|_| thresholds.stage_below > 0).map(|kernel| Staging::new(device, kernel));
        let staging = staging.transpose().unwrap_or_else(|refused| {
            common.notes.push(format!("small fragments are not packed: {refused}"));
            None
        });
        let gather = kernel.filter(|_| thresholds.gather_below > 0).map(Arc::clone);
        Ok(Self {
            loads: Lane::new(device, Direction::Load, up, thresholds, gather, None)?,
            offloads: Lane::new(device, Direction::Offload, down, thresholds, None, staging)?,
        })
    }

    /// Takes what has been sent; sleeps while there is nothing to do. `false`: the end.
    fn take_messages(&mut self, common: &Common, queue: &Receiver<Message>) -> bool {
        let idle = self.loads.is_idle() && self.offloads.is_idle();
        let first = if idle {
            match queue.recv() {
                Ok(message) => Some(message),
                Err(_) => return false,
            }
        } else {
            match queue.recv_timeout(Duration::from_micros(JOB_POLL_US)) {
                Ok(message) => Some(message),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => {
                    // The sender is gone, the jobs are not.
                    thread::sleep(Duration::from_micros(JOB_POLL_US));
                    None
                }
            }
        };
        if let Some(message) = first {
            self.receive(common, message);
        }
        self.receive_waiting(common, queue);
        true
    }

    fn receive_waiting(&mut self, common: &Common, queue: &Receiver<Message>) {
        loop {
            match queue.try_recv() {
                Ok(message) => self.receive(common, message),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return,
            }
        }
    }

    fn receive(&mut self, common: &Common, message: Message) {
        match message {
            Message::Orders(orders, mark) => {
                for order in orders {
                    match order.direction {
                        Direction::Load => self.loads.push(order, mark.clone()),
                        Direction::Offload => self.offloads.push(order, mark.clone()),
                    }
                }
            }
            Message::Fence { compute, offloads, reply } => {
                // Whoever asked may have given up.
                let _nobody_waits = reply.send(self.offloads.fence(common, compute, &offloads));
            }
        }
    }

    /// Gives what may be given, loads first, and answers what is over. A fence that comes meanwhile
    /// does not wait for all of that.
    fn work(&mut self, common: &Common, queue: &Receiver<Message>) {
        while self.loads.start_job(common) {
            self.receive_waiting(common, queue);
        }
        self.offloads.start_job(common);
        self.loads.finish_jobs(common);
        self.offloads.finish_jobs(common);
    }
}
