//! Individual typology angle: how light a skin colour is, as one angle in CIELAB, and its four buckets.
//!
//! ITA° = atan2(L* − 50, b*) · 180/π (Chardon et al. 1991). Published cuts divide it at 55, 41, 28, 10 and −30 into
//! very light, light, intermediate, tan, brown and dark; the paper needs four groups, so neighbours are merged at
//! three of these cuts. With [`DEFAULT_CUTS`] the ten swatches of the Monk scale reach all four buckets.

/// CIELAB coordinates of an sRGB colour with components in [0, 1], white point D65: (L*, a*, b*).
pub fn srgb_to_lab(rgb: [f64; 3]) -> [f64; 3] {
    const TO_XYZ: [[f64; 3]; 3] =
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]];
    const WHITE: [f64; 3] = [0.95047, 1.0, 1.08883];
    let linear = rgb.map(|c| if c <= 0.04045 { c / 12.92 } else { ((c + 0.055) / 1.055).powf(2.4) });
    let [x, y, z]: [f64; 3] = std::array::from_fn(|row| {
        let value: f64 = TO_XYZ[row].iter().zip(linear).map(|(m, c)| m * c).sum();
        lightness_curve(value / WHITE[row])
    });
    [116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)]
}

/// The cube root of CIELAB with its linear start.
fn lightness_curve(t: f64) -> f64 {
    const EPSILON: f64 = 216.0 / 24389.0;
    const KAPPA: f64 = 24389.0 / 27.0;
    if t > EPSILON {
        t.cbrt()
    } else {
        (KAPPA * t + 16.0) / 116.0
    }
}

/// Individual typology angle in degrees, −180..=180; a high angle is light skin.
pub fn ita_degrees(lab: [f64; 3]) -> f64 {
    (lab[0] - 50.0).atan2(lab[2]).to_degrees()
}

/// Cuts between dark, brown, intermediate (with tan) and light (with very light), in degrees.
pub const DEFAULT_CUTS: [f64; 3] = [-30.0, 10.0, 41.0];

/// Names of the buckets, light to dark.
pub const BUCKETS: [&str; 4] = ["light", "intermediate", "brown", "dark"];

/// Index into [`BUCKETS`] of an angle in degrees; `cuts` ascend, an angle on a cut belongs to the darker side.
pub fn bucket(ita: f64, cuts: [f64; 3]) -> usize {
    cuts.iter().filter(|&&cut| ita <= cut).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The Monk skin tones 1 to 10 and their angles, to the tenth of a degree to which they were noted.
    const MONK: [(u32, f64); 10] = [
        (0xf6ede4, 83.0),
        (0xf3e7db, 80.2),
        (0xf7ead0, 71.7),
        (0xeadaba, 64.7),
        (0xd7bd96, 50.3),
        (0xa07e56, 10.9),
        (0x825c43, -20.1),
        (0x604134, -55.4),
        (0x3a312a, -78.3),
        (0x292420, -84.3),
    ];

    fn angle(hex: u32) -> f64 {
        ita_degrees(srgb_to_lab([16, 8, 0].map(|shift| f64::from(hex >> shift & 255) / 255.0)))
    }

    #[test]
    fn monk_swatches() {
        let mut counts = [0; 4];
        for (hex, expected) in MONK {
            assert!((angle(hex) - expected).abs() < 0.051, "{hex:06x}: {} instead of {expected}", angle(hex));
            counts[bucket(angle(hex), DEFAULT_CUTS)] += 1;
        }
        assert_eq!(counts, [5, 1, 1, 3]);
    }

    /// White, black and the primaries as the CIE formulas give them (published to four decimals).
    #[test]
    fn lab_of_known_colours() {
        for (rgb, lab) in [
            ([1.0, 1.0, 1.0], [100.0, 0.0, 0.0]),
            ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
            ([1.0, 0.0, 0.0], [53.2408, 80.0925, 67.2032]),
            ([0.0, 1.0, 0.0], [87.7347, -86.1827, 83.1793]),
            ([0.0, 0.0, 1.0], [32.2970, 79.1875, -107.8602]),
        ] {
            let ours = srgb_to_lab(rgb);
            // the published values stem from a matrix rounded elsewhere; the largest difference is 0.0004
            assert!(ours.iter().zip(lab).all(|(a, b): (&f64, f64)| (a - b).abs() < 0.002), "{rgb:?}: {ours:?}");
        }
    }

    #[test]
    fn buckets_meet_at_the_cuts() {
        let of = |ita| BUCKETS[bucket(ita, DEFAULT_CUTS)];
        assert_eq!((of(41.1), of(41.0), of(10.1), of(10.0)), ("light", "intermediate", "intermediate", "brown"));
        assert_eq!((of(-29.9), of(-30.0), of(-90.0)), ("brown", "dark", "dark"));
    }
}
