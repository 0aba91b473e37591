package calls

import (
	"math"
	"strings"
	"unicode/utf8"
)

// Other is the label of limits and tenants that are not told apart.
const Other = "other"

// Tenants is a bounded set of tenants: those that came first. The zero value is empty. Methods may be called concurrently, and
// take a lock only for a tenant that is not in the set while there is room.
type Tenants struct{ known bounded[string, struct{}] }

// Label returns the label of a tenant: its name where it is one of the first most, and in UTF-8; else Other.
func (t *Tenants) Label(tenant string, most int) string {
	if t.known.find(tenant) != nil {
		return tenant
	}
	if len(t.known.all()) >= most || !utf8.ValidString(tenant) {
		return Other
	}
	if t.known.add(strings.Clone(tenant), most, func() *struct{} { return &struct{}{} }) == nil {
		return Other
	}
	return tenant
}

// ByTenant has a value for each label of a tenant. The zero value has none. Methods may be called concurrently.
type ByTenant[V any] struct {
	labelled bounded[string, V]
}

// Of returns the value of a label: a fresh one at its first call.
func (b *ByTenant[V]) Of(label string, fresh func() *V) *V {
	if v := b.labelled.find(label); v != nil {
		return v
	}
	return b.labelled.add(label, math.MaxInt, fresh)
}
