package top

import (
	"cmp"
	"slices"
	"time"
	"unique"
)

// A Report is the rankings of all limits at one time. As JSON it can be sent to another process, and merged there.
type Report struct {
	Since  time.Time `json:"since"` // the beginning of the time that the rankings cover
	Until  time.Time `json:"until"` // the time of the report
	Limits []Limit   `json:"limits"`
	// Uncounted is the charges to limits beyond MaxLimits, which no ranking has.
	Uncounted int64 `json:"uncounted"`
}

// Limit has the rankings of one limit.
type Limit struct {
	Limit  string  `json:"limit"` // its name
	Denied Ranking `json:"denied"`
	Used   Ranking `json:"used"`
}

// A Ranking is a list of keys by weight.
type Ranking struct {
	Rows []Row `json:"rows"` // the heaviest first
	// Total is the sum of all weights, also of keys that have no row. It is exact.
	Total int64 `json:"total"`
	// Absent is the most that a key without a row can weigh.
	Absent int64 `json:"absent"`
}

// A Row is a key and its weight in tokens of the limit.
type Row struct {
	Key    string `json:"key"`
	Weight int64  `json:"weight"` // at most: the true weight is in Weight-Error to Weight
	Error  int64  `json:"error"`
	// Back is the tokens that the key gave back since it has a row, in a ranking of use; else 0. Weight includes them.
	Back int64 `json:"back"`
}

// Report returns the rankings of this moment.
func (t *Observer) Report() Report {
	now := time.Since(t.began)
	window := int64(now / t.o.Window)
	r := Report{Since: t.began.Add(time.Duration(max(0, window-1)) * t.o.Window), Until: t.began.Add(now), Uncounted: t.uncounted.Load(), Limits: []Limit{}}
	for name, l := range t.limits.All() {
		r.Limits = append(r.Limits, l.report(name, window))
	}
	r.sort()
	return r
}

func (l *limit) report(name unique.Handle[string], window int64) Limit {
	all := [rankings]Ranking{{Rows: []Row{}}, {Rows: []Row{}}} // in JSON a list, also where it is empty
	for i := range l.shards {
		s := &l.shards[i]
		s.mu.Lock()
		s.advance(window)
		var now, before [rankings]Ranking
		for j := range all {
			now[j], before[j] = s.now[j].ranking(), s.before[j].ranking()
		}
		s.mu.Unlock()
		for j := range all { // no key is in two shards
			r := merge(now[j], before[j])
			all[j].Rows = append(all[j].Rows, r.Rows...)
			all[j].Total = sum(all[j].Total, r.Total)
			all[j].Absent = max(all[j].Absent, r.Absent)
		}
	}
	return Limit{Limit: name.Value(), Denied: all[denied], Used: all[used]}
}

func (t *table) ranking() Ranking {
	r := Ranking{Rows: make([]Row, len(t.rows)), Total: t.total, Absent: t.absent}
	for i, row := range t.rows {
		r.Rows[i] = Row{Key: row.key, Weight: row.weight, Error: row.over, Back: row.back}
	}
	return r
}

// merge returns the sum of two rankings of different calls.
func merge(a, b Ranking) Ranking {
	other := make(map[string]Row, len(b.Rows))
	for _, row := range b.Rows {
		other[row.Key] = row
	}
	rows := make([]Row, 0, len(a.Rows)+len(b.Rows))
	for _, row := range a.Rows {
		r, ok := other[row.Key]
		if !ok {
			r = Row{Weight: b.Absent, Error: b.Absent}
		}
		delete(other, row.Key)
		row.Weight, row.Error, row.Back = sum(row.Weight, r.Weight), sum(row.Error, r.Error), sum(row.Back, r.Back)
		rows = append(rows, row)
	}
	for _, row := range other {
		row.Weight, row.Error = sum(row.Weight, a.Absent), sum(row.Error, a.Absent)
		rows = append(rows, row)
	}
	return Ranking{Rows: rows, Total: sum(a.Total, b.Total), Absent: sum(a.Absent, b.Absent)}
}

// Merge returns the sum of the reports of several processes. It keeps the bounds, also of reports that Top made shorter. The
// result covers the time from the earliest beginning to the latest end. One process must not be among them twice.
func Merge(reports ...Report) Report {
	all := Report{Limits: []Limit{}}
	limits := map[string]Limit{}
	for i, r := range reports {
		if i == 0 || r.Since.Before(all.Since) {
			all.Since = r.Since
		}
		if r.Until.After(all.Until) {
			all.Until = r.Until
		}
		all.Uncounted = sum(all.Uncounted, r.Uncounted)
		for _, l := range r.Limits {
			// A limit that is not in limits yet has rankings of no calls: its Absent is 0.
			m := limits[l.Limit]
			limits[l.Limit] = Limit{Limit: l.Limit, Denied: merge(m.Denied, l.Denied), Used: merge(m.Used, l.Used)}
		}
	}
	for _, l := range limits {
		all.Limits = append(all.Limits, l)
	}
	all.sort()
	return all
}

// sort brings limits in the order of their names, and rows in that of their weights.
func (r *Report) sort() {
	slices.SortFunc(r.Limits, func(a, b Limit) int { return cmp.Compare(a.Limit, b.Limit) })
	for _, l := range r.Limits {
		for _, rows := range [...][]Row{l.Denied.Rows, l.Used.Rows} {
			slices.SortFunc(rows, func(a, b Row) int { return cmp.Or(cmp.Compare(b.Weight, a.Weight), cmp.Compare(a.Key, b.Key)) })
		}
	}
}

// Top returns the report with the heaviest n rows of each ranking, 0 or more. Absent of the rankings covers the rows that are
// left out.
func (r Report) Top(n int) Report {
	r.Limits = slices.Clone(r.Limits)
	for i := range r.Limits {
		l := &r.Limits[i]
		l.Denied, l.Used = l.Denied.top(n), l.Used.top(n)
	}
	return r
}

func (r Ranking) top(n int) Ranking {
	if n < len(r.Rows) {
		r.Absent = max(r.Absent, r.Rows[n].Weight)
		r.Rows = r.Rows[:n:n]
	}
	return r
}
