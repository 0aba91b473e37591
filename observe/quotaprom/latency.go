package quotaprom

import (
	"context"
	"math"
	"sort"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// latency is a histogram of durations: classic and native at a time. The one of client_golang allocates a number for each
// observation of less than a second in a native histogram.
type latency struct {
	desc   *prometheus.Desc
	labels []*dto.LabelPair
	began  *timestamppb.Timestamp

	ns        atomic.Int64
	zero      atomic.Uint64
	native    [nativeTo - nativeFrom + 1]atomic.Uint64
	classic   [len(classicNs) + 1]atomic.Uint64
	exemplars [len(classicNs) + 1]atomic.Pointer[dto.Exemplar]
}

// classicNs are the upper bounds of the classic buckets.
var classicNs = [...]time.Duration{
	time.Microsecond, 5 * time.Microsecond, 10 * time.Microsecond, 25 * time.Microsecond, 50 * time.Microsecond, 100 * time.Microsecond, 250 * time.Microsecond, 500 * time.Microsecond,
	time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond, 10 * time.Millisecond, 25 * time.Millisecond, 50 * time.Millisecond,
	100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond, time.Second, 2500 * time.Millisecond, 10 * time.Second,
}

// A native bucket i holds the values up to 2^(i/8) and above 2^((i-1)/8), in seconds.
const (
	schema     = 3
	nativeFrom = -239 // one nanosecond
	nativeTo   = 160  // twelve days; it holds the longer ones too
	zeroWidth  = 1.0 / (1 << 30)
)

// octave are the bounds of the eight buckets of an octave, for the fraction of math.Frexp.
var octave = func() (bounds [1 << schema]float64) {
	for i := range bounds {
		bounds[i] = math.Exp2(float64(i)/float64(len(bounds)) - 1)
	}
	return bounds
}()

func newLatency(desc *prometheus.Desc, labels ...*dto.LabelPair) *latency {
	return &latency{desc: desc, labels: labels, began: timestamppb.Now()}
}

// bucketOf returns the native bucket of a value of at least a nanosecond.
func bucketOf(seconds float64) int {
	frac, exp := math.Frexp(seconds)
	i := 0
	for i < len(octave) && octave[i] < frac {
		i++
	}
	return min(max(i+(exp-1)<<schema, nativeFrom), nativeTo)
}

// observe notes a duration, with the labels of an exemplar if there are any.
func (l *latency) observe(d time.Duration, exemplar prometheus.Labels) {
	l.ns.Add(int64(d))
	// The native buckets are noted first and read last, so that they have all that the classic ones have.
	if d <= 0 {
		l.zero.Add(1)
	} else {
		l.native[bucketOf(d.Seconds())-nativeFrom].Add(1)
	}
	i := 0
	for i < len(classicNs) && d > classicNs[i] {
		i++
	}
	l.classic[i].Add(1)
	if exemplar != nil {
		e := &dto.Exemplar{Value: proto.Float64(d.Seconds()), Timestamp: timestamppb.Now()}
		for name, value := range exemplar {
			e.Label = append(e.Label, pair(name, value))
		}
		sort.Slice(e.Label, func(i, j int) bool { return e.Label[i].GetName() < e.Label[j].GetName() })
		l.exemplars[i].Store(e)
	}
}

func pair(name, value string) *dto.LabelPair {
	return &dto.LabelPair{Name: proto.String(name), Value: proto.String(value)}
}

// Desc describes the histogram.
func (l *latency) Desc() *prometheus.Desc { return l.desc }

// Write writes the histogram.
func (l *latency) Write(m *dto.Metric) error {
	h := &dto.Histogram{
		CreatedTimestamp: l.began, SampleSum: proto.Float64(time.Duration(l.ns.Load()).Seconds()),
		Schema: proto.Int32(schema), ZeroThreshold: proto.Float64(zeroWidth),
	}
	count := uint64(0)
	for i := range l.classic {
		count += l.classic[i].Load()
		b := &dto.Bucket{CumulativeCount: proto.Uint64(count), UpperBound: proto.Float64(math.Inf(1)), Exemplar: l.exemplars[i].Load()}
		if i < len(classicNs) {
			b.UpperBound = proto.Float64(classicNs[i].Seconds())
		}
		if b.Exemplar != nil {
			h.Exemplars = append(h.Exemplars, b.Exemplar)
		}
		h.Bucket = append(h.Bucket, b)
	}
	sort.Slice(h.Exemplars, func(i, j int) bool { return h.Exemplars[i].GetValue() < h.Exemplars[j].GetValue() })
	count = l.zero.Load()
	h.ZeroCount = proto.Uint64(count)
	next, before := 0, int64(0) // the bucket after the last one written, and its count
	for i := range l.native {
		n := l.native[i].Load()
		if n == 0 {
			continue
		}
		count += n
		if gap := i - next; gap > 0 || len(h.PositiveSpan) == 0 {
			offset := int32(gap)
			if len(h.PositiveSpan) == 0 {
				offset += nativeFrom
			}
			h.PositiveSpan = append(h.PositiveSpan, &dto.BucketSpan{Offset: proto.Int32(offset), Length: proto.Uint32(0)})
		}
		*h.PositiveSpan[len(h.PositiveSpan)-1].Length++
		h.PositiveDelta = append(h.PositiveDelta, int64(n)-before)
		next, before = i+1, int64(n)
	}
	if len(h.PositiveSpan) == 0 {
		h.PositiveSpan = []*dto.BucketSpan{{Offset: proto.Int32(0), Length: proto.Uint32(0)}} // which tells that it is a native one
	}
	h.SampleCount = proto.Uint64(count)
	m.Label, m.Histogram = l.labels, h
	return nil
}

// none is the function of Options.Exemplar where there is none.
func none(context.Context) prometheus.Labels { return nil }
