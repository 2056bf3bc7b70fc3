//! Several ordered lists over the same places: each place is in one of them, or in none.

use super::Index;

const OUT: u32 = u32::MAX;

#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Link {
    colder: u32,
    hotter: u32,
}

/// Doubly linked rings over the numbers of places, each through a sentinel behind the last place.
/// Every operation is O(1) and allocates nothing.
#[derive(Debug)]
pub(super) struct Rings {
    links: Box<[Link]>,
    lens: Box<[u32]>,
    places: u32,
}

impl Rings {
    /// So many empty lists over `places` places.
    pub(super) fn new(places: u32, lists: u32) -> Self {
        let mut links = vec![Link { colder: OUT, hotter: OUT }; places as usize + lists as usize].into_boxed_slice();
        for sentinel in places..places + lists {
            links[sentinel as usize] = Link { colder: sentinel, hotter: sentinel };
        }
        Self { links, lens: vec![0; lists as usize].into_boxed_slice(), places }
    }

    fn put_after(&mut self, colder: u32, place: u32) {
        let hotter = self.links[colder as usize].hotter;
        self.links[place as usize] = Link { colder, hotter };
        self.links[colder as usize].hotter = place;
        self.links[hotter as usize].colder = place;
    }

    /// Puts a place that is in no list to the hot end of this one.
    pub(super) fn push_hot(&mut self, list: u32, place: u32) {
        self.put_after(self.links[(self.places + list) as usize].colder, place);
        self.lens[list as usize] += 1;
    }

    /// Puts a place that is in no list to the cold end of this one.
    pub(super) fn push_cold(&mut self, list: u32, place: u32) {
        self.put_after(self.places + list, place);
        self.lens[list as usize] += 1;
    }

    /// Puts a place that is in no list next to `than`, which is in this one, on its hotter side.
    pub(super) fn push_hotter(&mut self, list: u32, place: u32, than: u32) {
        self.put_after(than, place);
        self.lens[list as usize] += 1;
    }

    /// Takes a place out of its list, which is this one.
    pub(super) fn take(&mut self, list: u32, place: u32) {
        let Link { colder, hotter } = self.links[place as usize];
        self.links[colder as usize].hotter = hotter;
        self.links[hotter as usize].colder = colder;
        self.links[place as usize] = Link { colder: OUT, hotter: OUT };
        self.lens[list as usize] -= 1;
    }

    /// Whether the place is in a list.
    pub(super) fn holds(&self, place: u32) -> bool {
        self.links[place as usize].hotter != OUT
    }

    /// Places in a list.
    pub(super) fn len(&self, list: u32) -> u32 {
        self.lens[list as usize]
    }

    /// The place at the cold end of a list.
    pub(super) fn coldest(&self, list: u32) -> Option<u32> {
        self.hotter(self.places + list)
    }

    /// The next place of the same list, towards its hot end.
    pub(super) fn hotter(&self, place: u32) -> Option<u32> {
        let next = self.links[place as usize].hotter;
        (next < self.places).then_some(next)
    }

    /// The places of a list, the coldest first.
    pub(super) fn iter(&self, list: u32) -> impl Iterator<Item = u32> + '_ {
        std::iter::successors(self.coldest(list), |place| self.hotter(*place))
    }

    /// Asks the processor to fetch a place's links.
    pub(super) fn prefetch<I: Index>(&self, place: I) {
        kvcellar_block::prefetch(&self.links[place.number() as usize]);
    }

    /// Bytes of memory taken.
    pub(super) fn bytes(&self) -> usize {
        size_of_val(&*self.links) + size_of_val(&*self.lens)
    }
}
