//! Operations that the kernel holds, and so their memory.
//!
//! An operation goes in before its entry is pushed and comes out when its completion was read.
//! Whatever is still inside when this is dropped is given up: its memory is never freed or reused.

use crate::nvme::disk::Operation;

/// One operation, and how often it was started again.
#[derive(Debug)]
pub(super) struct Flying {
    pub(super) operation: Operation,
    pub(super) retries: u32,
}

/// Slots that the ring's entries name.
#[derive(Debug, Default)]
pub(super) struct Flight {
    slots: Vec<Option<Flying>>,
    free: Vec<usize>,
}

impl Flight {
    /// Takes an operation; its slot's number.
    pub(super) fn insert(&mut self, operation: Operation) -> usize {
        let flying = Some(Flying { operation, retries: 0 });
        if let Some(slot) = self.free.pop() {
            self.slots[slot] = flying;
            return slot;
        }
        self.slots.push(flying);
        self.slots.len() - 1
    }

    pub(super) fn get_mut(&mut self, slot: usize) -> Option<&mut Flying> {
        self.slots.get_mut(slot)?.as_mut()
    }

    /// Gives an operation back: the kernel is done with it.
    pub(super) fn remove(&mut self, slot: usize) -> Option<Operation> {
        let flying = self.slots.get_mut(slot)?.take()?;
        self.free.push(slot);
        Some(flying.operation)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        // The kernel may still transfer these: a leak is harmless, a reuse of the memory would not
        // be.
        self.slots.drain(..).flatten().for_each(std::mem::forget);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nvme::buffer::Buffer;
    use crate::nvme::disk::Kind;

    fn operation(token: u64) -> Operation {
        Operation { token, kind: Kind::Read, segment: 0, offset: 0, buffer: Buffer::pages(1) }
    }

    #[test]
    fn slots_are_used_again_and_an_operation_comes_out_once() {
        let mut flight = Flight::default();
        let (first, second) = (flight.insert(operation(1)), flight.insert(operation(2)));
        assert_ne!(first, second);
        assert_eq!(flight.remove(first).map(|operation| operation.token), Some(1));
        assert!(flight.remove(first).is_none(), "it came out before");
        assert!(flight.get_mut(first).is_none());
        assert!(!flight.is_empty());
        assert_eq!(flight.insert(operation(3)), first);
        assert_eq!(flight.get_mut(first).map(|flying| flying.operation.token), Some(3));
        assert!(flight.remove(99).is_none());
        assert!(flight.remove(first).is_some() && flight.remove(second).is_some());
        assert!(flight.is_empty());
    }
}
