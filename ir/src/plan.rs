//! The memory plan: an offset in one arena for every value that needs memory of its own, from exact lifetimes.
//!
//! Memory is known before anything runs. A plan is a pure function of the graph.

use crate::{Graph, ValueId};

/// Alignment of every offset, in bytes: a cache line, an AVX-512 register, a GPU memory segment.
pub const ALIGN: usize = 256;

/// Where the bytes of a value are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// In the arena.
    Arena {
        /// In bytes from its start.
        offset: usize,
    },
    /// In an external.
    External {
        /// The external value.
        root: ValueId,
        /// In bytes from its start.
        offset: usize,
    },
}

/// Offsets of all values, and what they add up to.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Memory of each value by id.
    pub memory: Vec<Memory>,
    /// Size of the arena in bytes.
    pub arena_bytes: usize,
    /// Largest sum of bytes alive at once: no arena can be smaller.
    pub live_bytes: usize,
    /// Sum of all values' bytes, what a run without a plan would allocate.
    pub total_bytes: usize,
}

/// A root value's bytes and the node indices (inclusive) between which they must stay.
#[derive(Debug)]
struct Lifetime {
    root: ValueId,
    bytes: usize,
    first: usize,
    last: usize,
}

/// Plans the arena: exact lifetimes (aliases extend their root's), greedy placement, each value at the lowest offset that is free
/// throughout its life. Values are tried in several orders, largest first to begin with; the first order that reaches the live bound
/// ends the search, else the best one counts.
pub fn plan(g: &Graph) -> Plan {
    let roots = g.roots();
    let lifetimes = lifetimes(g, &roots);
    let total_bytes = lifetimes.iter().map(|l| l.bytes).sum();
    let live_bytes = live(&lifetimes, g.nodes.len()).map_or(0, |(_, bytes)| bytes);

    let mut best: Option<(usize, Vec<usize>)> = None;
    for key in ORDERS {
        let mut order: Vec<usize> = (0..lifetimes.len()).collect();
        order.sort_by_cached_key(|&i| (key(&lifetimes[i]), i));
        let (arena, offsets) = place(&lifetimes, &order, g.nodes.len());
        if best.as_ref().is_none_or(|(least, _)| arena < *least) {
            best = Some((arena, offsets));
        }
        if arena <= live_bytes {
            break;
        }
    }
    let (arena_bytes, offsets) = best.unwrap_or_default();
    let mut offset_of = vec![0; g.values.len()];
    for (l, offset) in lifetimes.iter().zip(offsets) {
        offset_of[l.root.index()] = offset;
    }
    let memory = roots
        .into_iter()
        .map(|(root, inner)| match g.external(root) {
            Some(_) => Memory::External {
                root,
                offset: inner,
            },
            None => Memory::Arena {
                offset: offset_of[root.index()] + inner,
            },
        })
        .collect();
    Plan {
        memory,
        arena_bytes,
        live_bytes,
        total_bytes,
    }
}

/// What values are placed by; smaller keys come first.
type Key = (u128, usize);

/// Orders of placement.
const ORDERS: [fn(&Lifetime) -> Key; 4] = [
    |l| (u128::MAX - l.bytes as u128, l.first),
    |l| (u128::MAX - l.bytes as u128 * l.span(), l.first),
    |l| (u128::MAX - l.span(), usize::MAX - l.bytes),
    |l| (l.first as u128, usize::MAX - l.bytes),
];

impl Lifetime {
    /// Nodes during which it lives.
    fn span(&self) -> u128 {
        (self.last - self.first + 1) as u128
    }
}

/// Parts into which time is divided for [`place`]: most values are short-lived, and need only look at what lives in their part.
const PARTS: usize = 64;

/// A placed value.
#[derive(Clone, Copy)]
struct Placed {
    start: usize,
    end: usize,
    first: usize,
    last: usize,
}

/// Places values in `order`, each at the lowest free offset. Returns the bytes used and the offset of each value.
fn place(lifetimes: &[Lifetime], order: &[usize], n_nodes: usize) -> (usize, Vec<usize>) {
    let width = (n_nodes + 1).div_ceil(PARTS);
    let mut parts: Vec<Vec<Placed>> = vec![Vec::new(); PARTS];
    let mut all: Vec<Placed> = Vec::new();
    let mut offsets = vec![0; lifetimes.len()];
    let mut arena = 0;
    for &i in order {
        let l = &lifetimes[i];
        let (from, to) = (l.first / width, l.last / width);
        // Sorted by start: the first gap that is large enough ends the search.
        let placed = if from == to { &parts[from] } else { &all };
        let mut offset = 0;
        for p in placed {
            if p.first <= l.last && l.first <= p.last {
                if offset + l.bytes <= p.start {
                    break;
                }
                offset = offset.max(p.end);
            }
        }
        let new = Placed {
            start: offset,
            end: offset + l.bytes,
            first: l.first,
            last: l.last,
        };
        for list in parts[from..=to].iter_mut().chain([&mut all]) {
            let at = list.partition_point(|p| p.start <= offset);
            list.insert(at, new);
        }
        offsets[i] = offset;
        arena = arena.max(new.end);
    }
    (arena, offsets)
}

fn lifetimes(g: &Graph, roots: &[(ValueId, usize)]) -> Vec<Lifetime> {
    let mut list: Vec<Lifetime> = Vec::new();
    let mut at: Vec<Option<usize>> = vec![None; g.values.len()];
    for (i, node) in g.nodes.iter().enumerate() {
        for &r in &node.results {
            let root = roots[r.index()].0;
            if g.external(root).is_none() && at[root.index()].is_none() {
                at[root.index()] = Some(list.len());
                list.push(Lifetime {
                    root,
                    bytes: g.ty(root).bytes().next_multiple_of(ALIGN),
                    first: i,
                    last: i,
                });
            }
        }
        for v in node.present_args().chain(node.results.iter().copied()) {
            if let Some(k) = at[roots[v.index()].0.index()] {
                list[k].last = i;
            }
        }
    }
    for (_, v) in &g.outputs {
        if let Some(k) = at[roots[v.index()].0.index()] {
            list[k].last = g.nodes.len();
        }
    }
    list
}

/// The node at which most bytes are alive (the first of equals), and how many those are.
fn live(lifetimes: &[Lifetime], n_nodes: usize) -> Option<(usize, usize)> {
    let mut delta = vec![(0usize, 0usize); n_nodes + 2];
    for l in lifetimes {
        delta[l.first].0 += l.bytes;
        delta[l.last + 1].1 += l.bytes;
    }
    let mut live = 0;
    let mut peak = None;
    for (i, (born, dead)) in delta.into_iter().enumerate() {
        live = live + born - dead;
        if peak.is_none_or(|(_, most)| live > most) {
            peak = Some((i, live));
        }
    }
    peak
}

impl Plan {
    /// Memory of `v`.
    pub fn of(&self, v: ValueId) -> Memory {
        self.memory[v.index()]
    }

    /// The largest values that are alive at the moment of highest demand, largest first: what an out-of-memory error names.
    pub fn largest_at_peak(&self, g: &Graph, n: usize) -> Vec<(String, String, usize)> {
        let lifetimes = lifetimes(g, &g.roots());
        let peak = live(&lifetimes, g.nodes.len()).map_or(0, |(node, _)| node);
        let mut live: Vec<&Lifetime> = lifetimes
            .iter()
            .filter(|l| l.first <= peak && peak <= l.last)
            .collect();
        live.sort_by(|a, b| b.bytes.cmp(&a.bytes).then(a.root.cmp(&b.root)));
        live.into_iter()
            .take(n)
            .map(|l| {
                let path = crate::print::origin(g, l.root);
                (path, g.ty(l.root).to_string(), l.bytes)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arbitrary::{check_plan, sample, training};
    use proptest::prelude::*;

    fn random_lifetimes() -> impl Strategy<Value = Vec<Lifetime>> {
        prop::collection::vec((1..50usize, 0..300usize, 0..40usize), 1..200).prop_map(|list| {
            list.into_iter()
                .enumerate()
                .map(|(i, (units, first, span))| Lifetime {
                    root: ValueId(i as u32),
                    bytes: units * ALIGN,
                    first,
                    last: first + span,
                })
                .collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// In every order: no two values that live at once overlap, and no arena is smaller than what lives at once.
        #[test]
        fn placement_is_sound(lifetimes in random_lifetimes()) {
            let n = 340;
            let bound = live(&lifetimes, n).map_or(0, |(_, b)| b);
            for key in ORDERS {
                let mut order: Vec<usize> = (0..lifetimes.len()).collect();
                order.sort_by_key(|&i| key(&lifetimes[i]));
                let (arena, offsets) = place(&lifetimes, &order, n);
                prop_assert!(arena >= bound);
                for i in 0..lifetimes.len() {
                    prop_assert!(offsets[i] + lifetimes[i].bytes <= arena);
                    for j in 0..i {
                        let (a, b) = (&lifetimes[i], &lifetimes[j]);
                        let in_time = a.first <= b.last && b.first <= a.last;
                        let in_space = offsets[i] < offsets[j] + b.bytes && offsets[j] < offsets[i] + a.bytes;
                        prop_assert!(!(in_time && in_space), "{i} and {j}");
                    }
                }
            }
        }

        #[test]
        fn live_bound_is_the_largest_sum(lifetimes in random_lifetimes()) {
            let by_node = |i| -> usize {
                let alive = lifetimes.iter().filter(|l| l.first <= i && i <= l.last);
                alive.map(|l| l.bytes).sum()
            };
            let (node, most) = live(&lifetimes, 340).unwrap();
            prop_assert_eq!(most, (0..=340).map(by_node).max().unwrap());
            prop_assert_eq!(most, by_node(node));
        }

        #[test]
        fn training_graphs_run_in_their_plan(s in sample()) {
            let g = training(&s).unwrap();
            let p = plan(&g);
            check_plan(&g, &p).unwrap();
            prop_assert!(p.live_bytes <= p.arena_bytes && p.arena_bytes <= p.total_bytes);
            let largest = p.largest_at_peak(&g, usize::MAX);
            prop_assert_eq!(largest.iter().map(|(_, _, b)| b).sum::<usize>(), p.live_bytes);
            prop_assert_eq!(p, plan(&g));
        }
    }

    /// The check is able to fail: a plan with one value moved onto another is refused.
    #[test]
    fn a_wrong_plan_is_refused() {
        let g = training(&crate::arbitrary::Sample {
            layers: vec![crate::arbitrary::Kind::Ffn; 2],
            batch: 1,
            time: 8,
            d_model: 8,
            tied: false,
            dtype: crate::DType::F32,
        })
        .unwrap();
        let good = plan(&g);
        let mut refused = 0;
        for i in 0..good.memory.len() {
            let mut bad = good.clone();
            if let Memory::Arena { offset } = bad.memory[i]
                && offset > 0
            {
                bad.memory[i] = Memory::Arena { offset: 0 };
                refused += usize::from(check_plan(&g, &bad).is_err());
            }
        }
        assert!(refused > 10, "{refused}");
    }
}
