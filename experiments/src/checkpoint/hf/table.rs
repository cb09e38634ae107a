//! The correspondence between a model's parameters and the tensors of a checkpoint, as rows.
//!
//! Every parameter is a matrix of rows of equal width. A foreign tensor is a list of row ranges of our parameters: a renamed tensor is
//! one range, a fused projection several, an interleaved one many, an expert one slice of the stack. From this one list follow the
//! shapes to expect, import, export, and the foreign view of gradients.

use marimba_ir::Param;
use std::collections::HashMap;

/// How the sizes of the foreign tensor differ from `[rows, width]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Shape {
    /// Rank as ours: vectors `[rows]`, matrices `[rows, width]`.
    Plain,
    /// `[rows, 1, width]`: torch's depthwise convolution.
    Conv,
    /// Rows split in two dimensions, `[n, rows/n, ..]`.
    Split(usize),
}

/// One line of a family's table: `theirs` consists of `parts`, taken in `groups` turns of equal shares.
///
/// With one group the parts follow each other; with G groups the tensor is, for each g, the g-th G-th of every part.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Foreign name; `{e}` runs over experts, each holding its share of the rows.
    pub theirs: String,
    /// Our parameter and how many of its rows make a part; `None` is all rows not yet taken.
    pub parts: Vec<(String, Option<usize>)>,
    /// Number of turns.
    pub groups: usize,
    /// Foreign shape.
    pub shape: Shape,
}

/// Collects rules below a pair of prefixes.
#[derive(Debug, Default)]
pub struct Rules {
    list: Vec<Rule>,
    ours: String,
    theirs: String,
}

impl Rules {
    /// None yet.
    pub fn new() -> Self {
        Rules::default()
    }

    /// Sets the prefixes of the rules to come; empty ones are none.
    pub fn at(&mut self, ours: &str, theirs: &str) -> &mut Self {
        let dotted = |p: &str| {
            if p.is_empty() {
                String::new()
            } else {
                format!("{p}.")
            }
        };
        (self.ours, self.theirs) = (dotted(ours), dotted(theirs));
        self
    }

    /// Same rows, other name.
    pub fn same(&mut self, ours: &str, theirs: &str) -> &mut Self {
        self.rule(&[ours], theirs, 1, Shape::Plain)
    }

    /// A projection: matrix and, when the model has one, bias.
    pub fn linear(&mut self, ours: &str, theirs: &str) -> &mut Self {
        self.fused(&[ours], theirs, 1)
    }

    /// Several projections stored as one, in `groups` turns.
    pub fn fused(&mut self, ours: &[&str], theirs: &str, groups: usize) -> &mut Self {
        self.rule(ours, &format!("{theirs}.weight"), groups, Shape::Plain);
        let biases: Vec<String> = ours.iter().map(|o| format!("{o}.bias")).collect();
        let biases: Vec<&str> = biases.iter().map(String::as_str).collect();
        self.rule(&biases, &format!("{theirs}.bias"), groups, Shape::Plain)
    }

    /// Any rule over whole parameters.
    pub fn rule(&mut self, ours: &[&str], theirs: &str, groups: usize, shape: Shape) -> &mut Self {
        let parts = ours
            .iter()
            .map(|o| (format!("{}{o}", self.ours), None))
            .collect();
        self.list.push(Rule {
            theirs: format!("{}{theirs}", self.theirs),
            parts,
            groups,
            shape,
        });
        self
    }

    /// One parameter whose consecutive sections stand in `groups` turns.
    pub fn sections(
        &mut self,
        ours: &str,
        sections: &[usize],
        theirs: &str,
        groups: usize,
    ) -> &mut Self {
        for (suffix, stored) in [("", "weight"), (".bias", "bias")] {
            let parts = sections
                .iter()
                .map(|n| (format!("{}{ours}{suffix}", self.ours), Some(*n)))
                .collect();
            self.list.push(Rule {
                theirs: format!("{}{theirs}.{stored}", self.theirs),
                parts,
                groups,
                shape: Shape::Plain,
            });
        }
        self
    }

    /// The rules.
    pub fn finish(self) -> Vec<Rule> {
        self.list
    }
}

/// Rows `start..start+n` of our parameter `ours`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Piece {
    /// Index into the parameters.
    pub ours: usize,
    /// First row.
    pub start: usize,
    /// How many.
    pub n: usize,
}

/// A foreign tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Foreign {
    /// Its name.
    pub name: String,
    /// Its sizes.
    pub shape: Vec<usize>,
    /// What it consists of, first row first.
    pub pieces: Vec<Piece>,
}

/// Rows of a foreign tensor that make rows of ours.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Origin {
    /// First row of ours.
    pub start: usize,
    /// Index into [`Table::foreign`].
    pub foreign: usize,
    /// First row there.
    pub at: usize,
    /// How many.
    pub n: usize,
}

/// A family's correspondence for one model.
#[derive(Clone, Debug)]
pub struct Table {
    /// All foreign tensors.
    pub foreign: Vec<Foreign>,
    /// For each parameter, where its rows come from, first row first.
    pub origins: Vec<Vec<Origin>>,
}

/// Rows and elements per row of a parameter.
pub fn rows(p: &Param) -> (usize, usize) {
    let sizes = p.ty.sizes();
    match sizes.as_slice() {
        [n] => (*n, 1),
        [.., w] => (p.ty.len() / (*w).max(1), *w),
        [] => (1, 1),
    }
}

impl Table {
    /// Resolves rules for a model's parameters. A rule whose parameters the model lacks falls away.
    ///
    /// # Errors
    /// Names of parameters that no rule covers, that two rules cover, or that do not divide: the family has no word for them.
    pub fn new(rules: &[Rule], params: &[Param]) -> Result<Table, String> {
        let index: HashMap<&str, usize> = params
            .iter()
            .enumerate()
            .map(|(i, p)| (p.name.as_str(), i))
            .collect();
        let mut foreign: Vec<Foreign> = Vec::new();
        for rule in rules {
            let known: Vec<Option<usize>> = rule
                .parts
                .iter()
                .map(|(n, _)| index.get(n.as_str()).copied())
                .collect();
            if known.iter().all(Option::is_none) {
                continue;
            }
            // (parameter, first row, rows) of every part.
            let mut parts: Vec<Piece> = Vec::new();
            for ((name, n), at) in rule.parts.iter().zip(&known) {
                let ours = at.ok_or_else(|| {
                    format!("the model has no {name}, which {} needs", rule.theirs)
                })?;
                let start = parts.iter().filter(|p| p.ours == ours).map(|p| p.n).sum();
                let n = n.unwrap_or(rows(&params[ours]).0 - start);
                parts.push(Piece { ours, start, n });
            }
            let experts = if rule.theirs.contains("{e}") {
                params[parts[0].ours].ty.size(0)
            } else {
                1
            };
            for e in 0..experts {
                let share: Vec<Piece> = parts
                    .iter()
                    .map(|p| Piece {
                        start: p.start + e * (p.n / experts),
                        n: p.n / experts,
                        ..*p
                    })
                    .collect();
                if share.iter().any(|p| p.n % rule.groups != 0) {
                    return Err(format!(
                        "{} cannot be split in {} groups",
                        rule.theirs, rule.groups
                    ));
                }
                let mut pieces = Vec::new();
                for g in 0..rule.groups {
                    for p in &share {
                        let n = p.n / rule.groups;
                        pieces.push(Piece {
                            start: p.start + g * n,
                            n,
                            ..*p
                        });
                    }
                }
                let total: usize = pieces.iter().map(|p| p.n).sum();
                let param = &params[parts[0].ours];
                let width = rows(param).1;
                let mut shape = match rule.shape {
                    Shape::Plain => vec![total],
                    Shape::Conv => vec![total, 1],
                    Shape::Split(n) => vec![n, total / n.max(1)],
                };
                if param.ty.rank() > 1 {
                    shape.push(width);
                }
                foreign.push(Foreign {
                    name: rule.theirs.replace("{e}", &e.to_string()),
                    shape,
                    pieces,
                });
            }
        }
        let origins = origins(&foreign, params)?;
        Ok(Table { foreign, origins })
    }

    /// Our numbers as the foreign tensor `i` has them.
    pub fn gather(&self, i: usize, params: &[Param], ours: &dyn Fn(usize) -> Vec<f32>) -> Vec<f32> {
        let mut out = Vec::new();
        let mut cached: HashMap<usize, Vec<f32>> = HashMap::new();
        for p in &self.foreign[i].pieces {
            let width = rows(&params[p.ours]).1;
            let data = cached.entry(p.ours).or_insert_with(|| ours(p.ours));
            out.extend_from_slice(&data[p.start * width..(p.start + p.n) * width]);
        }
        out
    }
}

fn origins(foreign: &[Foreign], params: &[Param]) -> Result<Vec<Vec<Origin>>, String> {
    let mut origins: Vec<Vec<Origin>> = vec![Vec::new(); params.len()];
    for (k, f) in foreign.iter().enumerate() {
        let mut at = 0;
        for p in &f.pieces {
            origins[p.ours].push(Origin {
                start: p.start,
                foreign: k,
                at,
                n: p.n,
            });
            at += p.n;
        }
    }
    let mut problems = Vec::new();
    for (list, p) in origins.iter_mut().zip(params) {
        list.sort_by_key(|o| o.start);
        let mut next = 0;
        let fits = list.iter().all(|o| {
            let fits = o.start == next;
            next = o.start + o.n;
            fits
        });
        if list.is_empty() {
            problems.push(format!("no tensor holds {}", p.name));
        } else if !fits || next != rows(p).0 {
            problems.push(format!("the rows of {} are held twice or in part", p.name));
        }
        // Neighbouring ranges that are neighbours there too are one.
        list.dedup_by(|b, a| {
            let joined = a.foreign == b.foreign && a.at + a.n == b.at;
            if joined {
                a.n += b.n;
            }
            joined
        });
    }
    if problems.is_empty() {
        Ok(origins)
    } else {
        Err(problems.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use marimba_ir::{DType, Dim, ParamInit, Type, dims};

    fn param(name: &str, d: Vec<Dim>) -> Param {
        Param {
            name: name.into(),
            ty: Type::f32(d),
            compute: DType::F32,
            init: ParamInit::Zeros,
            decay: false,
            trainable: true,
            active: (1, 1),
            path: String::new(),
        }
    }

    #[test]
    fn interleaved_fused_and_stacked_tensors_resolve_to_rows() {
        let params = vec![
            param("m.in", dims![I 6, D 2]),
            param("m.q", dims![H 2, D 1]),
            param("m.k", dims![H 2, D 1]),
            param("m.e", dims![E 2, F 3, D 1]),
        ];
        let mut r = Rules::new();
        r.at("m", "x")
            .sections("in", &[3, 3], "in", 3)
            .fused(&["q", "k"], "qk", 2)
            .same("e", "experts.{e}.weight");
        let t = Table::new(&r.finish(), &params).unwrap();
        let names: Vec<_> = t
            .foreign
            .iter()
            .map(|f| (f.name.as_str(), f.shape.clone()))
            .collect();
        assert_eq!(
            names,
            [
                ("x.in.weight", vec![6, 2]),
                ("x.qk.weight", vec![4, 1]),
                ("x.experts.0.weight", vec![3, 1]),
                ("x.experts.1.weight", vec![3, 1])
            ]
        );
        let data: Vec<Vec<f32>> = vec![
            (0..12).map(|i| i as f32).collect(),
            vec![20.0, 21.0],
            vec![30.0, 31.0],
            (40..46).map(|i| i as f32).collect(),
        ];
        let get = |i: usize| data[i].clone();
        assert_eq!(
            t.gather(0, &params, &get),
            [0., 1., 6., 7., 2., 3., 8., 9., 4., 5., 10., 11.]
        );
        assert_eq!(t.gather(1, &params, &get), [20., 30., 21., 31.]);
        assert_eq!(t.gather(3, &params, &get), [43., 44., 45.]);
    }

    #[test]
    fn a_parameter_without_a_place_is_named() {
        let params = vec![param("a", dims![D 2]), param("b", dims![D 2])];
        let mut r = Rules::new();
        r.same("a", "a.weight");
        assert_eq!(
            Table::new(&r.finish(), &params).unwrap_err(),
            "no tensor holds b"
        );
    }
}
