package mutant

import (
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/quota"
)

// Windowed is a broken algorithm whose windows are known.
type Windowed struct {
	Algorithm
	Boundaries []time.Time
}

// Windows returns the mutants of A23.
func Windows() (all []Windowed) {
	const clause = "the whole capacity comes back at the given boundaries and at no other time"
	for _, m := range []struct {
		name       string
		period     algorithm.Period
		fault      quota.Algorithm
		boundaries []string
	}{
		{"a month has 30 days", algorithm.Monthly(1), algorithm.FixedWindow(10, 30*24*time.Hour), []string{"2027-02-01T00:00:00Z", "2027-03-01T00:00:00Z", "2027-04-01T00:00:00Z"}},
		{"a month from the 31st begins on the first of the next where that day is missing", algorithm.Monthly(31), algorithm.Calendar(10, algorithm.Monthly(1)),
			[]string{"2027-01-31T00:00:00Z", "2027-02-28T00:00:00Z", "2027-03-31T00:00:00Z"}},
		{"a day begins at midnight UTC", algorithm.Daily().In("Asia/Shanghai"), algorithm.Calendar(10, algorithm.Daily()), []string{"2027-02-01T00:00:00+08:00", "2027-02-02T00:00:00+08:00"}},
		{"the hour that is lost in spring is not", algorithm.Daily().In("Europe/Berlin"), algorithm.FixedWindowOffset(10, 24*time.Hour, 23*time.Hour),
			[]string{"2027-03-27T00:00:00+01:00", "2027-03-28T00:00:00+01:00", "2027-03-29T00:00:00+02:00"}},
		// As time.Date has it, which takes the offset of after the gap.
		{"a midnight that does not exist is on the wrong side of the gap", algorithm.Daily().In("America/Santiago"), algorithm.FixedWindowOffset(10, 24*time.Hour, 3*time.Hour),
			[]string{"2027-09-05T01:00:00-03:00", "2027-09-06T00:00:00-03:00"}},
		{"a day that does not exist is a window", algorithm.Daily().In("Pacific/Apia"), algorithm.FixedWindowOffset(10, 12*time.Hour, 10*time.Hour), []string{"2011-12-29T00:00:00-10:00", "2011-12-31T00:00:00+14:00"}},
		{"weeks begin on the weekday of the first of January 1970", algorithm.Weekly(time.Monday), algorithm.FixedWindow(10, 7*24*time.Hour), []string{"2027-02-01T00:00:00Z", "2027-02-08T00:00:00Z"}},
	} {
		var boundaries []time.Time
		for _, text := range m.boundaries {
			boundaries = append(boundaries, quota.Must(time.Parse(time.RFC3339, text)))
		}
		all = append(all, Windowed{Algorithm{m.name, "A23", clause, "want: until", func(fault bool) []quota.Algorithm {
			if fault {
				return []quota.Algorithm{m.fault}
			}
			return []quota.Algorithm{algorithm.Calendar(10, m.period)}
		}}, boundaries})
	}
	return all
}
