package calls

import (
	"maps"
	"math"
	"strings"
	"sync"
	"sync/atomic"
	"unicode/utf8"
)

// Other is the label of limits and tenants that are not told apart.
const Other = "other"

// Tenants is a bounded set of tenants: those that came first. The zero value is empty. Methods may be called concurrently, and
// take a lock only for a tenant that is not in the set while there is room.
type Tenants struct{ known ByTenant[struct{}] }

// Label returns the label of a tenant: its name where it is one of the first most, and in UTF-8; else Other.
func (t *Tenants) Label(tenant string, most int) string {
	if t.known.find(tenant) != nil {
		return tenant
	}
	if t.known.len() >= most || !utf8.ValidString(tenant) {
		return Other
	}
	if t.known.add(strings.Clone(tenant), most, func() *struct{} { return &struct{}{} }) == nil {
		return Other
	}
	return tenant
}

// ByTenant has a value for each label of a tenant. The zero value has none. Methods may be called concurrently.
type ByTenant[V any] struct {
	all atomic.Pointer[map[string]*V] // a map does not change once it is here
	mu  sync.Mutex                    // held while it is replaced
}

// Of returns the value of a label: a fresh one at its first call.
func (b *ByTenant[V]) Of(label string, fresh func() *V) *V {
	if v := b.find(label); v != nil {
		return v
	}
	return b.add(label, math.MaxInt, fresh)
}

func (b *ByTenant[V]) find(name string) *V {
	if all := b.all.Load(); all != nil {
		return (*all)[name]
	}
	return nil
}

func (b *ByTenant[V]) len() int {
	if all := b.all.Load(); all != nil {
		return len(*all)
	}
	return 0
}

// add returns the value of a name: a fresh one where it has none, or nil where most names have theirs.
func (b *ByTenant[V]) add(name string, most int, fresh func() *V) *V {
	b.mu.Lock()
	defer b.mu.Unlock()
	if v := b.find(name); v != nil || b.len() >= most {
		return v
	}
	grown := map[string]*V{name: fresh()}
	if all := b.all.Load(); all != nil {
		maps.Copy(grown, *all)
	}
	b.all.Store(&grown)
	return grown[name]
}
